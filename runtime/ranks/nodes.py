"""Training on several nodes: the number of this node, and waiting until all nodes are connected.

Kubeflow Trainer sets torchrun's PET_* variables in the pods of a TrainJob.  torchrun could wait for the other nodes,
too, but it does not report which are missing and ignores SIGTERM meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import environment, manifest
from runtime.errors import Preempted, Refused, WrongParameters
from runtime.wording import some

if TYPE_CHECKING:
    from runtime.distributed import Group

log = logging.getLogger("vgg.launch")

POLL_SECONDS = 0.5  # interval at which the other nodes are checked
REPORT_SECONDS = 60  # between two log lines about missing nodes
STORE_TIMEOUT_SECONDS = 60  # for an answer of the store of the first node, once it is reachable


@dataclass(frozen=True)
class Nodes:
    """This node among all nodes.  address, port: of the rendezvous store on the first node.

    Ranks are numbered by node, so that rank 0 is on node 0 after every restart, and the same number of ranks sums
    gradients in the same order.
    """

    count: int
    number: int
    address: str
    port: int

    def flags(self) -> list[str]:
        """Flags of torchrun."""
        return [
            f"--nnodes={self.count}", f"--node-rank={self.number}", "--rdzv-backend=static",
            f"--rdzv-endpoint={self.address}:{self.port}", f"--rdzv-conf=timeout={STORE_TIMEOUT_SECONDS}",
        ]  # fmt: skip


def from_environment(count: int) -> Nodes:
    """The nodes described by PET_*.  Raises WrongParameters if variables are missing or do not match `count`."""
    wanted = (environment.NUM_NODES, environment.NODE_RANK, environment.NODE_ADDRESS, environment.NODE_PORT)
    missing = [variable.name for variable in wanted if not variable.is_set()]
    if missing:
        raise WrongParameters(
            f"--nodes {count}: {', '.join(missing)} not set. Kubeflow Trainer sets them in the pods of a TrainJob. "
            "Otherwise set them on every machine: number of machines, number of this machine (from 0), host name of "
            "machine 0 and a free port on it."
        )
    num_nodes, rank = environment.NUM_NODES.get(), environment.NODE_RANK.get() or 0
    if num_nodes != count:
        raise WrongParameters(f"--nodes {count}, but PET_NNODES is {num_nodes}: they must be equal")
    if rank >= count:
        raise WrongParameters(f"PET_NODE_RANK: {rank} must be below the number of nodes, {count}")
    return Nodes(count, rank, environment.NODE_ADDRESS.get(), environment.NODE_PORT.get())


class Wait:
    """A wait for other nodes, with a timeout and log lines."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds
        self.next_report = self.start + min(5, REPORT_SECONDS)  # short waits are not reported

    def pause(self, what: str) -> None:
        """Wait for POLL_SECONDS.  what: description, for the log.  Raises Preempted after the timeout."""
        now = time.monotonic()
        waited = f"{now - self.start:.0f} s"
        if now - self.start > self.seconds:
            raise Preempted(
                f"{what}, for {waited} now. All nodes have to start again together. If this repeats, check the other "
                "pods: not scheduled, image not found, or blocked by a network policy?"
            )
        if now > self.next_report:
            log.info("%s, for %s now; giving up after %.0f s", what, waited, self.seconds)
            self.next_report = now + REPORT_SECONDS
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def rendezvous(nodes: Nodes, patience: float) -> Iterator[None]:
    """Wait until all nodes can resolve and reach the first one; then run the context.

    Raises Preempted if a node is missing for `patience` seconds, or if torchrun loses the connection to the others.
    """
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # defined in C++

    wait = Wait(patience)
    while (error := connection_error(nodes)) is not None:
        wait.pause(f"node {nodes.number} waits for node 0, {nodes.address}:{nodes.port} ({error})")
    try:
        # torchrun uses the same store (multi_tenant); wait_for_workers would block without handling SIGTERM
        store = TCPStore(
            nodes.address, nodes.port, nodes.count, nodes.number == 0, timedelta(seconds=STORE_TIMEOUT_SECONDS),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        store.set(f"vgg/node/{nodes.number}", socket.gethostname())
        while missing := [n for n in range(nodes.count) if not store.check([f"vgg/node/{n}"])]:
            wait.pause(f"node {nodes.number} waits for node {some(list(map(str, missing)))} of {nodes.count}")
        log.info("node %d: all %d nodes are connected", nodes.number, nodes.count)
        yield
    except DistError as lost:
        raise Preempted(
            f"node {nodes.number}: lost the other nodes ({str(lost).splitlines()[0][:200]}). All nodes have to start "
            "again together; they continue from the last checkpoint."
        ) from lost


def connection_error(nodes: Nodes) -> str | None:
    """Why the first node cannot be reached; None if it can.  On the first node, only its name is resolved."""
    try:
        if nodes.number == 0:
            socket.getaddrinfo(nodes.address, nodes.port, type=socket.SOCK_STREAM)
        else:
            socket.create_connection((nodes.address, nodes.port), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def expect_shared(directory: Path, group: Group) -> None:
    """Raises Refused unless all nodes see the same checkpoint folder; otherwise nodes would start from different steps.

    directory: need not exist yet.
    """
    if group.local_world_size == group.world_size:
        return
    # a new name every time: some file systems cache for a while that a file does not exist
    probe = manifest.sibling(directory, f".shared-{group.gather(uuid.uuid4().hex)[0][:12]}")
    if group.is_first:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    group.barrier()
    blind = sorted({host for host in group.gather(None if probe.exists() else socket.gethostname()) if host})
    if group.is_first:
        probe.unlink()
    if blind:
        raise Refused(
            f"{directory}: {some(blind)} does not see the files that node 0 writes. All nodes need the same "
            "storage for checkpoints: a volume that all can write (ReadWriteMany), or an object store (VGG_STORE).",
            blind,
        )
