"""Several hosts: the command of a TrainJob's pods, in network namespaces with names, addresses and links of their own.

A host is a namespace on a bridge, with a host name and an /etc/hosts as a pod has them.  Needs root and iproute2.
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
from test_launch import MARK, none_left, rank
from test_survival import Attempts, attempts, digest, planned  # noqa: F401  # a fixture

from runtime.shardset import ShardSet
from vgg.network.trained import Trained

JOB = "vgg-0123456789abcdef"
PORT = 29500
PATIENCE = 4  # VGG_HANG_SECONDS
BOUND = 14  # seconds on top of it in which everything has ended: stacks are written down, torchrun ends ranks in turn


def ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, timeout=20)


class Hosts:
    """Hosts on one bridge.  Their names are known from the beginning to none of them: `resolve` tells all."""

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
            # kubelet writes a pod's own name there; everybody else's is the DNS's business, and comes later
            self._hosts_file(host).write_text(f"127.0.0.1 localhost\n10.77.0.{host + 1} {JOB}-node-0-{host}\n")

    def _hosts_file(self, host: int) -> Path:
        return Path(f"/etc/netns/{self.tag}n{host}/hosts")

    def resolve(self) -> None:
        names = "".join(f"10.77.0.{host + 1} {JOB}-node-0-{host}.{JOB}\n" for host in range(self.count))
        for host in range(self.count):
            with open(self._hosts_file(host), "a") as file:
                file.write(names)

    def link(self, host: int, state: str) -> None:
        """Cut a host off ('down'), or let it back ('up'): packets are lost, nobody is told."""
        ip("link", "set", f"{self.tag}v{host}", state)

    def start(self, host: int, ranks: int, arguments: list[object], **env: str) -> subprocess.Popen[str]:
        """What Trainer has a pod run, with what it sets there."""
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
    """As many as the parameter says."""
    probe = f"vgg{os.getpid()}probe"
    if subprocess.run(["sh", "-c", f"ip netns add {probe} && ip netns del {probe}"], capture_output=True).returncode:
        pytest.skip("TRAINING ON SEVERAL HOSTS IS NOT TESTED HERE: network namespaces need root and iproute2")
    made = Hosts(request.param, tmp_path)
    try:
        yield made
    finally:
        made.close()


def long_enough(params_file: Path, epochs: int = 6) -> Path:
    """To be caught in the act."""
    text = json.loads(params_file.read_text())
    text["train"] |= {"epochs": epochs}
    params_file.write_text(json.dumps(text))
    return params_file


@pytest.fixture
def undisturbed(attempts: Attempts, params_file: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Trained:
    """What as many ranks (the parameter) on one host end with; the params file is of this run."""
    text = json.loads(long_enough(params_file).read_text())
    result = attempts(tmp_path / "undisturbed", [{"world": request.param}], narrow=False, **text["train"])[0]
    assert result["codes"] == [0] * request.param, result["stderr"]
    return Trained.open(tmp_path / "undisturbed")


def ended(children: list[subprocess.Popen[str]], within: float, codes: set[int]) -> list[str]:
    """What the hosts said, once all have ended."""
    deadline, said = time.monotonic() + within, []
    for child in children:
        said.append(child.communicate(timeout=max(1.0, deadline - time.monotonic()))[1])
    assert {child.returncode for child in children} <= codes, "\n--\n".join(said)
    return said


def same(tmp_path: Path, undisturbed: Trained) -> None:
    """The run ended with the same images in the same order, and the same weights."""
    found = Trained.open(tmp_path / "model")
    assert json.loads((tmp_path / "m/train.json").read_text())["samples"] == undisturbed.step.state["samples"]
    assert found.weights_sha256 == undisturbed.weights_sha256
    assert none_left(tmp_path)


def again(hosts: Hosts, ranks: int, arguments: list[object]) -> None:
    """What JobSet does: all pods anew, the same command."""
    ended([hosts.start(host, ranks, arguments) for host in range(hosts.count)], 120, {0})


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_late_first_host_and_a_short_cut_change_nothing(
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
    assert not (tmp_path / "model/manifest.json").exists()  # it was in time
    hosts.link(1, "up")
    said = ended([first, second], 60, {0})
    assert "node 0: all 2 nodes are there" in said[0]
    found = Trained.open(tmp_path / "model").step
    assert found.state["samples"] == digest(planned(shards, found.step))
    assert none_left(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("hosts", "undisturbed", "ranks", "cut"), [(2, 2, 1, 0), (2, 4, 2, 1)], indirect=["hosts", "undisturbed"]
)
def test_a_host_that_is_cut_off_for_long(
    hosts: Hosts, undisturbed: Trained, ranks: int, cut: int, params_file: Path, tmp_path: Path
) -> None:
    """Nobody waits for ever: all end with 75 while it is still cut off, and go on when all start again."""
    arguments = flags("train", tmp_path, params_file)
    hosts.resolve()
    children = [hosts.start(host, ranks, arguments) for host in (0, 1)]
    rank(tmp_path, 2 * ranks - 1)
    hosts.link(cut, "down")
    said = ended(children, PATIENCE + BOUND, {75})
    assert all(f"no sign of life for {PATIENCE} s from rank" in text for text in said)
    assert none_left(tmp_path)
    hosts.link(cut, "up")
    again(hosts, ranks, arguments)
    same(tmp_path, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("hosts", "undisturbed", "gone", "blow"),
    [(3, 3, 0, signal.SIGKILL), (2, 2, 1, signal.SIGKILL), (3, 3, 1, signal.SIGTERM)],
    indirect=["hosts", "undisturbed"],
)
def test_a_host_that_ends(
    hosts: Hosts, undisturbed: Trained, gone: int, blow: signal.Signals, params_file: Path, tmp_path: Path
) -> None:
    """Its pod is killed, or told to stop: the others end with 75 soon, and all go on when all start again."""
    arguments = flags("train", tmp_path, params_file)
    hosts.resolve()
    children = [hosts.start(host, 1, arguments) for host in range(hosts.count)]
    rank(tmp_path, hosts.count - 1)
    children[gone].send_signal(blow)
    ended(children, BOUND, {75, -9} if blow == signal.SIGKILL else {75})
    assert children[gone].returncode == (-9 if blow == signal.SIGKILL else 75)
    again(hosts, 1, arguments)
    same(tmp_path, undisturbed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alone(number: int, **env: str) -> subprocess.Popen[str]:
    """One of two nodes, on this host; the other one does not come."""
    command = [sys.executable, "-m", "components.launch", "--nodes", "2", "1", "components.train"]
    trainer = {"PET_NNODES": "2", "PET_NODE_RANK": str(number), "PET_MASTER_ADDR": "localhost"}
    return subprocess.Popen(
        command,
        env=environment(**{**trainer, "PET_MASTER_PORT": str(free_port()), **env}),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_node_that_is_left_alone_says_who_is_missing_and_gives_up_or_is_stopped() -> None:
    children = [alone(number, VGG_HANG_SECONDS="1") for number in (0, 1)]
    stopped = alone(0)
    said = ended(children, 30, {75})
    assert "node 0 waits for node 1 of 2, for 5 s now" in said[0]
    assert "node 1 waits for node 0, localhost:" in said[1] and "Connection refused" in said[1]
    stopped.send_signal(signal.SIGTERM)  # as PID 1 of a container it is not ended by that unless it listens
    said += ended([stopped], 5, {75})
    assert "Traceback" not in "".join(said)


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


def test_checkpoints_that_each_node_has_for_itself_are_refused(tmp_path: Path) -> None:
    port = str(free_port())
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED], cwd=tmp_path, env=environment(**where, RANK=str(rank)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for child in children:
        out, error = child.communicate(timeout=60)
        assert out == "all see it\n" and "runtime.errors.Refused" in error, error
        assert f"model: {socket.gethostname()} does not see there what node 0 writes" in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT not set"),
        ({"PET_NNODES": "3"}, "--nodes 2, but PET_NNODES says 3"),
        ({"PET_NODE_RANK": "2"}, "PET_NODE_RANK: 2 is not below the number of nodes, 2"),
        ({"PET_MASTER_PORT": "auto"}, "PET_MASTER_PORT: must be an integer of 0 or more, not 'auto'"),
    ],
)
def test_wrong_usage(env: dict[str, str], words: str) -> None:
    right = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": "29500"}
    told = {**right, **env} if env else {}
    done = program("launch", "--nodes", "2", "1", "components.train", cwd=Path.cwd(), **told)
    assert done.returncode == 64 and words in done.stderr


def test_restarts_are_not_for_one_of_several_nodes() -> None:
    done = program("launch", "--nodes", "2", "--max-restarts", "1", "1", "components.train", cwd=Path.cwd())
    assert done.returncode == 64 and "--max-restarts is for one node" in done.stderr
