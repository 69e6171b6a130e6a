"""Calls that shared and odd file systems (NFS, Lustre, FUSE, SMB) refuse, each with what is done then."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("vgg.filesystem")

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_reported: set[str] = set()


def lock(file: IO[Any], wait: bool = False, required: bool = False) -> bool:
    """Lock an open file until it is closed or its process ends.  Returns False if another process holds the lock.

    wait: wait for the other process instead.  Without locks on the file system (NFS without lockd, Lustre without
    -o flock, some FUSE) it says so once and returns True; False if a lock is required.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if required:
            return False
        folder = str(Path(file.name).parent)
        if folder not in _reported:
            _reported.add(folder)
            log.warning(
                "%s: its file system has no locks (%s); make sure that only one run writes there",
                folder,
                error.strerror,
            )
    return True


def unlock(file: IO[Any]) -> None:
    """Release a lock; closing the file is not enough if a process forked meanwhile has it open too."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def fsync(descriptor: int) -> None:
    """Make a file or folder durable, as far as its file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def fsync_directory(directory: Path) -> None:
    """Make renames and deletions in a folder durable, as far as its file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # SMB, and folders that may be written but not listed
        return
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int | None:
    """Free bytes of a folder's file system; None if it does not know (some FUSE file systems say 0 of 0)."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def total_bytes(folder: Path) -> int | None:
    """Size of a folder's file system, bytes; None if it does not know."""
    return shutil.disk_usage(folder).total or None


def make_readable(path: Path) -> None:
    """Give a file the usual mode 0644, where the file system has modes."""
    with contextlib.suppress(OSError):
        os.chmod(path, 0o644)
