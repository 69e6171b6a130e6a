"""Where shards are written: one writer at a time, in a folder or below a prefix of an object store."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from components import program, storage
from vgg.targets import Directory, Target


@contextlib.contextmanager
def writing(place: str) -> Iterator[tuple[Target, Callable[[], None]]]:
    """Where shards are written, and a check that raises when another process has taken the place over.

    Raises Preempted (run again) while another process writes there.
    """
    if not storage.is_remote(place):
        with program.only_writer(Path(place)):
            yield Directory(Path(place)), lambda: None
        return
    from components.lease import Lease
    from components.s3target import Target as Prefix

    target = Prefix(place)
    with Lease(target.prefix, f"process {os.getpid()} of {socket.gethostname()}") as lease:
        yield target, lease.check
