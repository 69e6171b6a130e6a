"""Training on several hosts: the command of a TrainJob's pods in network namespaces.

A host is a network namespace on a bridge, with a host name and an /etc/hosts like a pod.  Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import environment, flags, program
from ports import free_port
from test_launch import MARK, none_left, rank
from test_survival import Attempts, attempts, digest, planned  # noqa: F401  # a fixture

from runtime.shards.shardset import ShardSet
from vgg.network.trained import Trained

JOB = "vgg-0123456789abcdef"
PORT = 29500
PATIENCE = 4  # VGG_HANG_SECONDS
BOUND = 14  # seconds after PATIENCE until everything has ended: stacks are written, torchrun ends ranks in turn


def ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, timeout=20)


class Hosts:
    """Hosts on one bridge.  They cannot resolve each other's names before resolve() is called."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder, self.tag = count, folder, f"vgg{os.getpid()}"
        self.running: list[subprocess.Popen[str]] = []
        ip("link", "add", f"{self.tag}br", "type", "bridge")
        ip("link", "set", f"{self.tag}br", "up")
        for host in range(count):
            space = f"{self.tag}n{host}"
            ip("netns", "add", space)
            ip("link", "add", f"{self.tag}v{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"{self.tag}v{host}", "master", f"{self.tag}br", "up")
            for interface in ("lo", "eth0"):
                ip("-n", space, "link", "set", interface, "up")
            ip("-n", space, "addr", "add", f"10.77.0.{host + 1}/24", "dev", "eth0")
            self._hosts_file(host).parent.mkdir(parents=True)
            # kubelet writes the name of the pod itself; names of other pods come later, from DNS
            self._hosts_file(host).write_text(f"127.0.0.1 localhost\n10.77.0.{host + 1} {JOB}-node-0-{host}\n")

    def _hosts_file(self, host: int) -> Path:
        return Path(f"/etc/netns/{self.tag}n{host}/hosts")

    def resolve(self) -> None:
        names = "".join(f"10.77.0.{host + 1} {JOB}-node-0-{host}.{JOB}\n" for host in range(self.count))
        for host in range(self.count):
            with open(self._hosts_file(host), "a") as file:
                file.write(names)

    def link(self, host: int, state: str) -> None:
        """Disconnect ('down') or reconnect ('up') a host: packets are lost without an error."""
        ip("link", "set", f"{self.tag}v{host}", state)

    def start(self, host: int, ranks: int, arguments: list[object], **env: str) -> subprocess.Popen[str]:
        """Run the command of a pod, with the variables that Trainer sets."""
        command = [sys.executable, "-m", "components.launch", "--nodes", self.count, ranks, "components.train"]
        trainer = {
            "PET_NNODES": str(self.count), "PET_NPROC_PER_NODE": str(ranks), "PET_NODE_RANK": str(host),
            "PET_MASTER_ADDR": f"{JOB}-node-0-0.{JOB}", "PET_MASTER_PORT": str(PORT),
            "VGG_HANG_SECONDS": str(PATIENCE), "VGG_WORKERS": "0", MARK: str(self.folder),
        }  # fmt: skip
        inside = ["ip", "netns", "exec", f"{self.tag}n{host}", "unshare", "--uts", "sh", "-c"]
        named = [*inside, 'hostname "$0" && exec "$@"', f"{JOB}-node-0-{host}"]
        child = subprocess.Popen(
            [*named, *map(str, [*command, *arguments])], cwd=self.folder, env=environment(**{**trainer, **env}),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.running.append(child)
        return child

    def close(self) -> None:
        for child in self.running:
            child.kill()
            child.wait(10)
        for host in range(self.count):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("link", "del", f"{self.tag}v{host}")
            ip("netns", "del", f"{self.tag}n{host}")
            shutil.rmtree(self._hosts_file(host).parent)
        ip("link", "del", f"{self.tag}br")


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hosts]:
    """As many hosts as the parameter."""
    probe = f"vgg{os.getpid()}probe"
    if subprocess.run(["sh", "-c", f"ip netns add {probe} && ip netns del {probe}"], capture_output=True).returncode:
        pytest.skip("TRAINING ON SEVERAL HOSTS IS NOT TESTED: network namespaces need root and iproute2")
    hosts = Hosts(request.param, tmp_path)
    try:
        yield hosts
    finally:
        hosts.close()


def long_enough(params_file: Path, epochs: int = 6) -> Path:
    """Make training long enough to be interrupted; returns the params file."""
    params = json.loads(params_file.read_text())
    params["train"] |= {"epochs": epochs}
    params_file.write_text(json.dumps(params))
    return params_file


@pytest.fixture
def undisturbed(attempts: Attempts, params_file: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Trained:
    """The result of as many ranks as the parameter, on one host; it sets the params file."""
    params = json.loads(long_enough(params_file).read_text())
    result = attempts(tmp_path / "undisturbed", [{"world": request.param}], narrow=False, **params["train"])[0]
    assert result["codes"] == [0] * request.param, result["stderr"]
    return Trained.open(tmp_path / "undisturbed")


def ended(children: list[subprocess.Popen[str]], within: float, codes: set[int]) -> list[str]:
    """Wait for the hosts; returns their stderr."""
    deadline, errors = time.monotonic() + within, []
    for child in children:
        errors.append(child.communicate(timeout=max(1.0, deadline - time.monotonic()))[1])
    assert {child.returncode for child in children} <= codes, "\n--\n".join(errors)
    return errors


def expect_same(tmp_path: Path, undisturbed: Trained) -> None:
    """Check that the run ended with the same samples and weights."""
    found = Trained.open(tmp_path / "model")
    assert json.loads((tmp_path / "m/train.json").read_text())["samples"] == undisturbed.step.state["samples"]
    assert found.weights_sha256 == undisturbed.weights_sha256
    assert none_left(tmp_path)


def run_again(hosts: Hosts, ranks: int, arguments: list[object]) -> None:
    """Start the same command again on all hosts, as JobSet does with pods."""
    ended([hosts.start(host, ranks, arguments) for host in range(hosts.count)], 120, {0})


@pytest.mark.faults
@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_late_first_host_and_a_short_disconnection_do_not_matter(
    hosts: Hosts, shards: ShardSet, params_file: Path, tmp_path: Path
) -> None:
    arguments = flags("train", tmp_path, long_enough(params_file, 3))
    second = hosts.start(1, 1, arguments, VGG_HANG_SECONDS="10")
    time.sleep(1)
    first = hosts.start(0, 1, arguments, VGG_HANG_SECONDS="10")
    time.sleep(3)
    hosts.resolve()
    rank(tmp_path, 1)
    hosts.link(1, "down")
    time.sleep(1.5)
    assert not (tmp_path / "model/manifest.json").exists()  # training was not finished yet
    hosts.link(1, "up")
    errors = ended([first, second], 60, {0})
    assert "node 0: all 2 nodes are connected" in errors[0]
    found = Trained.open(tmp_path / "model").step
    assert found.state["samples"] == digest(planned(shards, found.step))
    assert none_left(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("hosts", "undisturbed", "ranks", "host"), [(2, 2, 1, 0), (2, 4, 2, 1)], indirect=["hosts", "undisturbed"]
)
def test_a_host_is_disconnected_for_long(
    hosts: Hosts, undisturbed: Trained, ranks: int, host: int, params_file: Path, tmp_path: Path
) -> None:
    """All exit with 75 while it is disconnected, and continue when all start again."""
    arguments = flags("train", tmp_path, params_file)
    hosts.resolve()
    children = [hosts.start(number, ranks, arguments) for number in (0, 1)]
    rank(tmp_path, 2 * ranks - 1)
    hosts.link(host, "down")
    errors = ended(children, PATIENCE + BOUND, {75})
    assert all(f"no heartbeat for {PATIENCE} s from rank" in text for text in errors)
    assert none_left(tmp_path)
    hosts.link(host, "up")
    run_again(hosts, ranks, arguments)
    expect_same(tmp_path, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("hosts", "undisturbed", "host", "sent"),
    [(3, 3, 0, signal.SIGKILL), (2, 2, 1, signal.SIGKILL), (3, 3, 1, signal.SIGTERM)],
    indirect=["hosts", "undisturbed"],
)
def test_a_host_ends(
    hosts: Hosts, undisturbed: Trained, host: int, sent: signal.Signals, params_file: Path, tmp_path: Path
) -> None:
    """Its pod is killed or stopped: the others exit with 75 soon, and all continue when all start again."""
    arguments = flags("train", tmp_path, params_file)
    hosts.resolve()
    children = [hosts.start(number, 1, arguments) for number in range(hosts.count)]
    rank(tmp_path, hosts.count - 1)
    children[host].send_signal(sent)
    ended(children, BOUND, {75, -9} if sent == signal.SIGKILL else {75})
    assert children[host].returncode == (-9 if sent == signal.SIGKILL else 75)
    run_again(hosts, 1, arguments)
    expect_same(tmp_path, undisturbed)


def alone(number: int, **env: str) -> subprocess.Popen[str]:
    """Start one of two nodes on this host, without the other."""
    command = [sys.executable, "-m", "components.launch", "--nodes", "2", "1", "components.train"]
    trainer = {"PET_NNODES": "2", "PET_NODE_RANK": str(number), "PET_MASTER_ADDR": "localhost"}
    return subprocess.Popen(
        command,
        env=environment(**{**trainer, "PET_MASTER_PORT": str(free_port()), **env}),
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.faults
def test_a_node_without_the_others_reports_them_and_gives_up_or_is_stopped() -> None:
    children = [alone(number, VGG_HANG_SECONDS="1") for number in (0, 1)]
    stopped = alone(0)
    errors = ended(children, 30, {75})
    assert "node 0 waits for node 1 of 2, for 5 s now" in errors[0]
    assert "node 1 waits for node 0, localhost:" in errors[1] and "Connection refused" in errors[1]
    stopped.send_signal(signal.SIGTERM)  # PID 1 of a container ignores it unless it has a handler
    errors += ended([stopped], 5, {75})
    assert "Traceback" not in "".join(errors)


SHARED = """
import sys
from pathlib import Path
from runtime.ranks.nodes import expect_shared
from runtime.distributed import joined
with joined(20) as group:
    expect_shared(Path("both/model"), group)
    print("all see it", flush=True)
    expect_shared(Path(f"{group.rank}/model"), group)
"""


def test_a_separate_checkpoint_folder_on_each_node_is_refused(tmp_path: Path) -> None:
    port = str(free_port())
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED], cwd=tmp_path, env=environment(**common, RANK=str(rank)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for child in children:
        out, error = child.communicate(timeout=60)
        assert out == "all see it\n" and "runtime.errors.Refused" in error, error
        assert f"model: {socket.gethostname()} does not see the files that node 0 writes" in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT not set"),
        ({"PET_NNODES": "3"}, "--nodes 2, but PET_NNODES is 3"),
        ({"PET_NODE_RANK": "2"}, "PET_NODE_RANK: 2 must be below the number of nodes, 2"),
        ({"PET_MASTER_PORT": "auto"}, "PET_MASTER_PORT: must be an integer of 0 or more, not 'auto'"),
    ],
)
def test_wrong_usage(env: dict[str, str], message: str) -> None:
    valid = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": "29500"}
    variables = {**valid, **env} if env else {}
    done = program("launch", "--nodes", "2", "1", "components.train", cwd=Path.cwd(), **variables)
    assert done.returncode == 64 and message in done.stderr


def test_restarts_are_not_allowed_on_several_nodes() -> None:
    done = program("launch", "--nodes", "2", "--max-restarts", "1", "1", "components.train", cwd=Path.cwd())
    assert done.returncode == 64 and "--max-restarts is for one node" in done.stderr
