"""The tracking server of deploy/, started on this machine with its command, environment and files."""

from __future__ import annotations

import base64
import contextlib
import copy
import http.client
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import requests
from conftest import environment
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from rendering import rendered
from requests.adapters import HTTPAdapter
from s3servers import free_port

from components.register.registry import open_registry
from runtime.errors import Refused
from security.canary import find

PASSWORD, KEY = "a-long-enough-password", "a-key-for-sessions"  # in the secret vgg-mlflow
STEPS_PASSWORD = "another-long-password"  # in the secret vgg-tracking
NAMESPACE = "kubeflow"
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


class Pod:
    """The pod's container as a process: volumes are folders, the port is any free one."""

    def __init__(self, folder: Path, database: Path) -> None:
        folder.mkdir(exist_ok=True)
        objects = {(d["kind"], d["metadata"]["name"]): d for d in rendered("base")}
        pod = objects["Deployment", "mlflow"]["spec"]["template"]["spec"]
        self.container, self.port = copy.deepcopy(pod["containers"][0]), free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.mounts = {m["mountPath"]: folder / m["name"] for m in self.container["volumeMounts"]}
        for path in self.mounts.values():
            path.mkdir()
        [config] = [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v]
        for name, text in objects["ConfigMap", config]["data"].items():
            (folder / "config" / name).write_text(self._localised(text))
        shutil.copy(database, folder / "data" / "mlflow.db")  # creating MLflow's tables takes long

    def _localised(self, text: str) -> str:
        """A text with the paths, port and namespace of this machine."""
        paths = "|".join(map(re.escape, self.mounts))
        text = re.sub(rf"(?<![\w.-])({paths})(?=/|$)", lambda found: str(self.mounts[found[1]]), text)
        return text.replace("$(NAMESPACE)", NAMESPACE).replace("--port=5000", f"--port={self.port}")

    def allow_local_address(self) -> None:
        """Accept its address on this machine as host name too, for clients that cannot use the service's name."""
        host = self.address.removeprefix("http://")
        self.container["args"] = [word.replace("127.0.0.1:5000", host) for word in self.container["args"]]

    def start(self, secret: dict[str, str], log: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        env = {}
        for variable in self.container["env"]:
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                assert source["secretKeyRef"]["name"] == "vgg-mlflow"
                assert not source["secretKeyRef"].get("optional")
                if (key := source["secretKeyRef"]["key"]) in secret:
                    env[variable["name"]] = secret[key]
            elif "value" in variable:
                env[variable["name"]] = self._localised(variable["value"])
        command = [*self.container["command"], *map(self._localised, self.container["args"])]
        assert command[0] == "python"
        home = {"HOME": str(self.mounts["/tmp"]), "TMPDIR": str(self.mounts["/tmp"])}
        return subprocess.Popen(
            [sys.executable, *command[1:]], cwd=self.mounts["/tmp"], env=environment(**{**env, **home}),
            stdout=log, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def post(self, path: str, body: dict[str, str], auth: tuple[str, str], version: str = "2.0") -> requests.Response:
        return requests.post(f"{self.address}/api/{version}/mlflow/{path}", auth=auth, json=body, timeout=20)

    def create_user(self) -> None:
        """The user of the steps, as described in docs/cluster.md."""
        new = {"username": "vgg", "password": STEPS_PASSWORD}
        assert self.post("users/create", new, auth=("admin", PASSWORD)).status_code == 200

    def request(self, host: str, user: str = "", path: str = SEARCH) -> int:
        """HTTP status of a request.  user: 'name:password'."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        login = {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()} if user else {}
        connection.request("GET", path, headers={"Host": host, **login})
        answer = connection.getresponse()
        answer.read()
        return answer.status


@contextlib.contextmanager
def running(pod: Pod) -> Iterator[None]:
    with open(pod.mounts["/tmp"] / "log", "w") as log:  # an unread pipe would block the server
        process = pod.start({"admin-password": PASSWORD, "secret-key": KEY}, log)
    try:
        deadline, ready = time.monotonic() + 90, 0
        probe = pod.container["readinessProbe"]["httpGet"]
        while ready != 200:
            assert process.poll() is None and time.monotonic() < deadline, "does not start"
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                ready = pod.request("10.244.0.7:5000", path=probe["path"])  # by the pod's address, as the kubelet does
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


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
        tags = {"weights_sha256": "a" * 64, "evaluation": '{"top1_error": 0.1}'}
        created = models.client.create_model_version("first", run.artifact_uri, run.run_id, tags)
        models.promote(created.version, None)
        found = models.champion()
        assert found and (found.version, found.evaluation) == (created.version, {"top1_error": 0.1})


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
