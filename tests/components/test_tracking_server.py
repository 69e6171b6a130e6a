"""The tracking server of deploy/, started on this machine with its command, environment and files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflowpod import KEY, NAMESPACE, PASSWORD, STEPS_PASSWORD, Pod, running
from requests.adapters import HTTPAdapter

from components.register.registry import open_registry
from runtime.errors import Refused
from security.canary import find


def test_the_server_of_the_deployment(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = Pod(tmp_path / "pod", empty_database)
    admin = f"admin:{PASSWORD}"
    with running(pod):
        names = [
            f"mlflow{rest}" for rest in ("", f".{NAMESPACE}", f".{NAMESPACE}.svc", f".{NAMESPACE}.svc.cluster.local")
        ]
        for host in [*names, *(f"{name}:5000" for name in names), "localhost:5000", "127.0.0.1:5000"]:
            assert pod.request(host, admin) == 200, host
        assert pod.request("mlflow:5000") == pod.request("localhost:5000") == 401
        for host in ("evil.example", "mlflow:80", "10.244.0.7:5000", f"localhost:{pod.port}"):
            assert pod.request(host, admin) == 403, host
        for user in ("admin:password1234", "admin:", "nobody:password1234"):
            assert pod.request("mlflow:5000", user) == 401, user
        act_as_a_step(pod, monkeypatch)
        new = {"username": "other", "password": STEPS_PASSWORD}
        assert pod.post("users/create", new, auth=("vgg", STEPS_PASSWORD)).status_code == 403  # not an administrator
        user_has_the_permissions_of_the_steps(pod, tmp_path)
        champion_is_found_from_the_first_run_on()
        missing_permission_is_reported(pod, "hidden", "DENY")
        missing_permission_is_reported(pod, "readable", "READ")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
        with pytest.raises(Refused, match="refuses the credentials: check MLFLOW_TRACKING_USERNAME"):
            with open_registry("first") as models:
                models.champion()
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
        with pytest.raises(Refused, match=r"refuses the credentials.*It says: 'You are not authenticated"):
            with open_registry("first") as models:
                models.champion()
    written = {str(path.relative_to(tmp_path / "pod")) for path in (tmp_path / "pod").rglob("*") if path.is_file()}
    assert written >= {"data/mlflow.db", "data/users.db"}
    assert [line for secret in (PASSWORD, STEPS_PASSWORD, KEY) for line in find(secret, tmp_path / "pod")] == []
    assert all(path.startswith(("data/", "scratch/", "config/auth.ini")) for path in written)


def act_as_a_step(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send requests to the service's name, as in the cluster, with the steps' user."""
    monkeypatch.setattr(HTTPAdapter, "add_headers", lambda _, request, **kw: request.headers.update(Host="mlflow:5000"))
    pod.create_user()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", pod.address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "vgg")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", STEPS_PASSWORD)


def user_has_the_permissions_of_the_steps(pod: Pod, folder: Path) -> None:
    """Create runs, artifacts through the server, a model version and its alias as an ordinary user."""
    client = MlflowClient(pod.address, pod.address)
    (folder / "package.txt").write_text("weights")
    experiment = client.create_experiment("vgg-imagenet")
    run = client.create_run(experiment).info
    client.log_param(run.run_id, "seed", 1)
    client.log_artifact(run.run_id, str(folder / "package.txt"))
    client.create_registered_model("vgg")
    version = client.create_model_version("vgg", f"{run.artifact_uri}/package.txt", run.run_id)
    client.set_registered_model_alias("vgg", "champion", version.version)
    assert run.artifact_uri.startswith("mlflow-artifacts:/")  # never a path of the server's


def champion_is_found_from_the_first_run_on() -> None:
    """For an ordinary user, the alias of a missing model looks like a forbidden one (403)."""
    with open_registry("first") as models:
        assert models.champion() is None
    with open_registry("first") as models:  # an earlier run ended before it registered a version
        with contextlib.suppress(MlflowException):  # exists already without a default permission to read
            models.client.create_registered_model("first")
        assert models.champion() is None
        run = models.client.create_run(models.client.search_experiments()[0].experiment_id).info
        evaluation = {"top1_error": 0.1, "top5_error": 0, "num_images": 5, "data_digest": "d"}
        tags = {"weights_sha256": "a" * 64, "evaluation": json.dumps(evaluation)}
        created = models.client.create_model_version("first", run.artifact_uri, run.run_id, tags)
        models.promote(created.version, None)
        found = models.champion()
        assert found and (found.version, found.evaluation) == (created.version, evaluation)


def missing_permission_is_reported(pod: Pod, name: str, permission: str) -> None:
    """A hidden model is not mistaken for a missing one: its champion would be ignored."""
    admin = ("admin", PASSWORD)
    assert pod.post("registered-models/create", {"name": name}, auth=admin).status_code == 200
    grant = {"username": "vgg", "resource_type": "registered_model", "resource_id": name, "permission": permission}
    assert pod.post("users/permissions/grant", grant, admin, version="3.0").status_code == 200
    with pytest.raises(Refused, match=f"denies user vgg a permission on registered model '{name}'"):
        with open_registry(name) as models:
            assert models.champion() is None and permission == "READ"
            models.client.create_model_version(name, "/nowhere")


@pytest.mark.faults
def test_a_server_without_default_permissions(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = Pod(tmp_path / "pod", empty_database)
    config = pod.mounts["/etc/mlflow"] / "auth.ini"
    config.write_text(config.read_text().replace("default_permission = READ", "default_permission = NO_PERMISSIONS"))
    assert "NO_PERMISSIONS" in config.read_text()
    with running(pod):
        act_as_a_step(pod, monkeypatch)
        MlflowClient(pod.address).create_experiment("vgg-imagenet")
        champion_is_found_from_the_first_run_on()
        missing_permission_is_reported(pod, "hidden", "DENY")


@pytest.mark.faults
def test_it_does_not_start_without_its_secret(tmp_path: Path, empty_database: Path) -> None:
    started = {
        "needs a password": Pod(tmp_path / "a", empty_database).start({"secret-key": KEY}),
        "static secret key": Pod(tmp_path / "b", empty_database).start({"admin-password": PASSWORD}),
    }
    for message, process in started.items():
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode != 0
        assert message in output
