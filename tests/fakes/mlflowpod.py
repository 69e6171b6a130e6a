"""The tracking server of deploy/ as a process: its pod's command, environment and files, on this machine."""

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

import requests
from conftest import environment
from ending import ended
from ports import free_port
from rendering import rendered

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
    with ended(process):
        deadline, ready = time.monotonic() + 90, 0
        probe = pod.container["readinessProbe"]["httpGet"]
        while ready != 200:
            assert process.poll() is None and time.monotonic() < deadline, "does not start"
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                ready = pod.request("10.244.0.7:5000", path=probe["path"])  # by the pod's address, as the kubelet does
        yield
