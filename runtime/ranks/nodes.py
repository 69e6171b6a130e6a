"""Several machines that train together: who this one is, and waiting until all are there.

Kubeflow Trainer tells it to the pods of a TrainJob in torchrun's own variables, PET_*.  torchrun could wait too, but
not by name: it says nothing of who is missing, and does not hear SIGTERM meanwhile.
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

if TYPE_CHECKING:
    from runtime.distributed import Group

log = logging.getLogger("vgg.launch")

LOOK_SECONDS = 0.5  # between two looks for the others
SAY_SECONDS = 60  # between two lines on who is missing
ANSWER_SECONDS = 60  # for the first node's store to answer, once it is there


@dataclass(frozen=True)
class Nodes:
    """This machine among all of them.  address, port: where the first one keeps the store by which ranks find another.

    Ranks are numbered by nodes, so that rank 0 is on node 0 after every restart, and the same world adds up in the
    same order.
    """

    count: int
    number: int
    address: str
    port: int

    def flags(self) -> list[str]:
        """torchrun's."""
        return [
            f"--nnodes={self.count}", f"--node-rank={self.number}", "--rdzv-backend=static",
            f"--rdzv-endpoint={self.address}:{self.port}", f"--rdzv-conf=timeout={ANSWER_SECONDS}",
        ]  # fmt: skip


def from_environment(count: int) -> Nodes:
    """Raises WrongParameters unless the variables are there and speak of as many nodes."""
    wanted = (environment.NUM_NODES, environment.NODE_RANK, environment.NODE_ADDRESS, environment.NODE_PORT)
    missing = [variable.name for variable in wanted if not variable.is_set()]
    if missing:
        raise WrongParameters(
            f"--nodes {count}: {', '.join(missing)} not set. Kubeflow Trainer sets them in the pods of a TrainJob; "
            "without it, set them on every machine: the number of machines, which one it is (0 …), the first one's "
            "name and a free port of it."
        )
    num_nodes, rank = environment.NUM_NODES.get(), environment.NODE_RANK.get() or 0
    if num_nodes != count:
        raise WrongParameters(f"--nodes {count}, but PET_NNODES says {num_nodes}: the two must be the same")
    if rank >= count:
        raise WrongParameters(f"PET_NODE_RANK: {rank} is not below the number of nodes, {count}")
    return Nodes(count, rank, environment.NODE_ADDRESS.get(), environment.NODE_PORT.get())


class Wait:
    """One wait for others, limited and told of."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.monotonic(), seconds
        self.next_word = self.began + min(5, SAY_SECONDS)  # who is a little late is not worth a line

    def a_moment(self, what: str) -> None:
        """Raises Preempted when it has been long enough."""
        now = time.monotonic()
        waited = f"{now - self.began:.0f} s"
        if now - self.began > self.seconds:
            raise Preempted(
                f"{what}, for {waited} now. All nodes start again together; if it stays so, look at the other pods: "
                "not scheduled, an image that is not found, a network policy between them?"
            )
        if now > self.next_word:
            log.info("%s, for %s now; giving up after %.0f s", what, waited, self.seconds)
            self.next_word = now + SAY_SECONDS
        time.sleep(LOOK_SECONDS)


@contextlib.contextmanager
def met(nodes: Nodes, patience: float) -> Iterator[None]:
    """Wait until all nodes are there, each with a name that resolves and a way to the first; inside, they are.

    Raises Preempted when somebody has not come for `patience` seconds, and when torchrun loses the others.
    """
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # a name of its C++ part

    wait = Wait(patience)
    while (trouble := out_of_reach(nodes)) is not None:
        wait.a_moment(f"node {nodes.number} waits for node 0, {nodes.address}:{nodes.port} ({trouble})")
    try:
        # torchrun's own, in this process, is this one (multi_tenant); that it waits for workers would not be stopped
        store = TCPStore(
            nodes.address, nodes.port, nodes.count, nodes.number == 0, timedelta(seconds=ANSWER_SECONDS),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        store.set(f"vgg/node/{nodes.number}", socket.gethostname())
        while missing := [n for n in range(nodes.count) if not store.check([f"vgg/node/{n}"])]:
            wait.a_moment(f"node {nodes.number} waits for node {', '.join(map(str, missing))} of {nodes.count}")
        log.info("node %d: all %d nodes are there", nodes.number, nodes.count)
        yield
    except DistError as error:
        raise Preempted(
            f"node {nodes.number}: the other nodes are out of reach ({str(error).splitlines()[0][:200]}). All nodes "
            "start again together and go on from the last checkpoint."
        ) from error


def out_of_reach(nodes: Nodes) -> str | None:
    """Why the first node cannot be talked to yet; None if it can.  The first node itself needs its name only."""
    try:
        if nodes.number == 0:
            socket.getaddrinfo(nodes.address, nodes.port, type=socket.SOCK_STREAM)
        else:
            socket.create_connection((nodes.address, nodes.port), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def expect_shared(directory: Path, group: Group) -> None:
    """Raises Refused unless all nodes see the same folder of checkpoints: each would go on from its own, or from none.

    directory: need not be there yet.
    """
    if group.local_world_size == group.world_size:
        return
    # a name that nobody has asked for before: what is not there is remembered for a while by some file systems
    sign = manifest.sibling(directory, f".shared-{group.gather(uuid.uuid4().hex)[0][:12]}")
    if group.is_first:
        sign.parent.mkdir(parents=True, exist_ok=True)
        sign.touch()
    group.barrier()
    blind = sorted({host for host in group.gather(None if sign.exists() else socket.gethostname()) if host})
    if group.is_first:
        sign.unlink()
    if blind:
        raise Refused(
            f"{directory}: {', '.join(blind)} does not see there what node 0 writes. Nodes that train together need "
            "one place for checkpoints: a volume that all can write (ReadWriteMany), or an object store (VGG_STORE)."
        )
