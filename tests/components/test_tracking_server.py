"""The tracking server of deploy/: its very command, environment and files, started on this machine."""

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

PASSWORD, KEY = "a-long-enough-password", "a-key-for-sessions"  # of the secret vgg-mlflow
STEPS_PASSWORD = "another-long-password"  # of the secret vgg-tracking
NAMESPACE = "kubeflow"
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


class Pod:
    """The pod's container as a process: its volumes are folders, its port is one that is free."""

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
            (folder / "config" / name).write_text(self._placed(text))
        shutil.copy(database, folder / "data" / "mlflow.db")  # MLflow's tables, which take long to make

    def _placed(self, text: str) -> str:
        """A text with the mounts' paths, port and namespace of this machine."""
        paths = "|".join(map(re.escape, self.mounts))
        text = re.sub(rf"(?<![\w.-])({paths})(?=/|$)", lambda found: str(self.mounts[found[1]]), text)
        return text.replace("$(NAMESPACE)", NAMESPACE).replace("--port=5000", f"--port={self.port}")

    def answer_here(self) -> None:
        """To its address on this machine too, for clients that cannot ask by the service's name."""
        here = self.address.removeprefix("http://")
        self.container["args"] = [word.replace("127.0.0.1:5000", here) for word in self.container["args"]]

    def start(self, secret: dict[str, str], said: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        env = {}
        for variable in self.container["env"]:
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                assert source["secretKeyRef"]["name"] == "vgg-mlflow"
                assert not source["secretKeyRef"].get("optional")
                if (key := source["secretKeyRef"]["key"]) in secret:
                    env[variable["name"]] = secret[key]
            elif "value" in variable:
                env[variable["name"]] = self._placed(variable["value"])
        words = [*self.container["command"], *map(self._placed, self.container["args"])]
        assert words[0] == "python"
        home = {"HOME": str(self.mounts["/tmp"]), "TMPDIR": str(self.mounts["/tmp"])}
        return subprocess.Popen(
            [sys.executable, *words[1:]], cwd=self.mounts["/tmp"], env=environment(**{**env, **home}),
            stdout=said, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def post(self, path: str, body: dict[str, str], auth: tuple[str, str], version: str = "2.0") -> requests.Response:
        return requests.post(f"{self.address}/api/{version}/mlflow/{path}", auth=auth, json=body, timeout=20)

    def make_user(self) -> None:
        """Of the steps, as docs/cluster.md says."""
        new = {"username": "vgg", "password": STEPS_PASSWORD}
        assert self.post("users/create", new, auth=("admin", PASSWORD)).status_code == 200

    def ask(self, host: str, user: str = "", path: str = SEARCH) -> int:
        """Status of an answer.  user: 'name:password'."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        login = {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()} if user else {}
        connection.request("GET", path, headers={"Host": host, **login})
        answer = connection.getresponse()
        answer.read()
        return answer.status


@contextlib.contextmanager
def running(pod: Pod) -> Iterator[None]:
    with open(pod.mounts["/tmp"] / "said", "w") as said:  # a pipe that nobody reads would fill
        process = pod.start({"admin-password": PASSWORD, "secret-key": KEY}, said)
    try:
        deadline, ready = time.monotonic() + 90, 0
        probe = pod.container["readinessProbe"]["httpGet"]
        while ready != 200:
            assert process.poll() is None and time.monotonic() < deadline, "does not start"
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                ready = pod.ask("10.244.0.7:5000", path=probe["path"])  # as the kubelet does: by the pod's address
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
            assert pod.ask(host, admin) == 200, host
        assert pod.ask("mlflow:5000") == pod.ask("localhost:5000") == 401
        for host in ("evil.example", "mlflow:80", "10.244.0.7:5000", f"localhost:{pod.port}"):
            assert pod.ask(host, admin) == 403, host
        for user in ("admin:password1234", "admin:", "nobody:password1234"):
            assert pod.ask("mlflow:5000", user) == 401, user
        be_a_step(pod, monkeypatch)
        new = {"username": "other", "password": STEPS_PASSWORD}
        assert pod.post("users/create", new, auth=("vgg", STEPS_PASSWORD)).status_code == 403  # no administrator
        can_do_what_the_steps_do(pod, tmp_path)
        finds_its_champion_from_the_first_run_on()
        says_which_permission_is_missing(pod, "hidden", "DENY")
        says_which_permission_is_missing(pod, "readable", "READ")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
        with pytest.raises(Refused, match="does not let us in: check MLFLOW_TRACKING_USERNAME"):
            with open_registry("first") as models:
                models.champion()
    written = {str(path.relative_to(tmp_path / "pod")) for path in (tmp_path / "pod").rglob("*") if path.is_file()}
    assert written >= {"data/mlflow.db", "data/users.db"}
    assert [line for secret in (PASSWORD, STEPS_PASSWORD, KEY) for line in find(secret, tmp_path / "pod")] == []
    assert all(path.startswith(("data/", "scratch/", "config/auth.ini")) for path in written)


def be_a_step(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask by the service's name, as in the cluster, as the steps' user."""
    monkeypatch.setattr(HTTPAdapter, "add_headers", lambda _, ask, **kw: ask.headers.update(Host="mlflow:5000"))
    pod.make_user()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", pod.address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "vgg")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", STEPS_PASSWORD)


def can_do_what_the_steps_do(pod: Pod, folder: Path) -> None:
    """Runs, artifacts through the server, a model version and its alias: with the rights of an ordinary user."""
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


def finds_its_champion_from_the_first_run_on() -> None:
    """An ordinary user, for whom the alias of a model that is not there looks like a forbidden one (403)."""
    with open_registry("first") as models:
        assert models.champion() is None
    with open_registry("first") as models:  # a run before this one ended before it registered something
        with contextlib.suppress(MlflowException):  # there already where nothing may be read by default
            models.client.create_registered_model("first")
        assert models.champion() is None
        run = models.client.create_run(models.client.search_experiments()[0].experiment_id).info
        tags = {"weights_sha256": "a" * 64, "evaluation": '{"top1_error": 0.1}'}
        made = models.client.create_model_version("first", run.artifact_uri, run.run_id, tags)
        models.promote(made.version, None)
        found = models.champion()
        assert found and (found.version, found.evaluation) == (made.version, {"top1_error": 0.1})


def says_which_permission_is_missing(pod: Pod, name: str, permission: str) -> None:
    """A model that is there and hidden is not taken for one that is not there: its champion would not be asked."""
    admin = ("admin", PASSWORD)
    assert pod.post("registered-models/create", {"name": name}, auth=admin).status_code == 200
    grant = {"username": "vgg", "resource_type": "registered_model", "resource_id": name, "permission": permission}
    assert pod.post("users/permissions/grant", grant, admin, version="3.0").status_code == 200
    with pytest.raises(Refused, match=f"forbids user vgg what registered model '{name}' needs"):
        with open_registry(name) as models:
            assert models.champion() is None and permission == "READ"
            models.client.create_model_version(name, "/nowhere")


@pytest.mark.faults
def test_a_server_that_shows_nothing_by_default(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = Pod(tmp_path / "pod", empty_database)
    config = pod.mounts["/etc/mlflow"] / "auth.ini"
    config.write_text(config.read_text().replace("default_permission = READ", "default_permission = NO_PERMISSIONS"))
    assert "NO_PERMISSIONS" in config.read_text()
    with running(pod):
        be_a_step(pod, monkeypatch)
        MlflowClient(pod.address).create_experiment("vgg-imagenet")
        finds_its_champion_from_the_first_run_on()
        says_which_permission_is_missing(pod, "hidden", "DENY")


@pytest.mark.faults
def test_it_does_not_start_without_its_secret(tmp_path: Path, empty_database: Path) -> None:
    started = {
        "needs a password": Pod(tmp_path / "a", empty_database).start({"secret-key": KEY}),
        "static secret key": Pod(tmp_path / "b", empty_database).start({"admin-password": PASSWORD}),
    }
    for told, process in started.items():
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode != 0
        assert told in output
