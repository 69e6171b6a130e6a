"""The output directory of a stage: a local folder, or one that is mirrored in an object store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime import manifest
from runtime.errors import WrongParameters
from runtime.store import storage
from runtime.targets import Directory, Output, Target, only_writer


def output_at(location: str) -> Output:
    """The output directory of a resolved argument (storage.resolve)."""
    if not storage.is_remote(location):
        return Output(Path(location))
    from runtime.store.mirror import Mirror

    return Mirror(location)


def manifest_at(location: str) -> bytes | None:
    """The manifest at a resolved argument, alone and not verified; None if nothing is finished there."""
    if storage.is_remote(location):
        from runtime.store.s3 import Prefix

        return Prefix(location).get(manifest.NAME)
    return Directory(Path(location)).read(manifest.NAME) if Path(location).is_dir() else None


def downloaded(path: str) -> Path:
    """The local folder of an argument's finished directory.  Raises Refused if it is in a store and not finished."""
    return output_at(storage.resolve(path)).download()


def content_of(path: str, what: str) -> bytes:
    """The bytes of a file, local, store: or s3://.  what: the parameter that names it.

    Raises WrongParameters if it is not there or is no file that can be read.
    """
    location = storage.resolve(path)
    if storage.is_remote(location):
        from runtime.store.s3 import Prefix

        folder, _, name = location.rpartition("/")
        data = Prefix(folder).get(name) if name else None
        if data is None:
            raise WrongParameters(f"{what} {location}: there is no such object. Give the address of a file.")
        return data
    try:
        return Path(location).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as reason:
        raise WrongParameters(f"{what} {location}: {reason.strerror}. Give the path of a file.") from None


@contextlib.contextmanager
def writing_shards(location: str) -> Iterator[tuple[Target, Callable[[], None]]]:
    """The target for shards, and a check that raises Preempted when another process has taken the location over.

    Raises Preempted (run again) while another process writes there.
    """
    if not storage.is_remote(location):
        with only_writer(Path(location)):
            yield Directory(Path(location)), lambda: None
        return
    from runtime.store.lease import Lease, this_process
    from runtime.store.s3target import Target as StoreTarget

    target = StoreTarget(location)
    with Lease(target.prefix, this_process()) as lease:
        yield target, lease.check
