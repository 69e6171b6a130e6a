"""Output directories that live in an object store: worked on in a folder here, kept there.

What arrives is verified by the manifests, and manifest.json travels last in both directions, so there as here a
directory is finished when it has one.  A directory of checkpoints is kept step by step while training goes on; whoever
continues it, on whatever node, first brings the newest that is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from components import program, storage
from components.lease import Lease
from components.s3 import Prefix
from vgg import manifest
from vgg.checkpoint import step_name
from vgg.errors import Preempted, Refused, Unreachable

log = logging.getLogger("vgg")

EXPIRY_SECONDS = 60.0  # of the lease
ARRIVALS = 3  # of a file whose content is not what its manifest says
STEP = re.compile("step-[0-9]{8}")  # a checkpoint's folder, as step_name() calls it


def at(place: str) -> Folder:
    """The output directory of a resolved argument (storage.resolve)."""
    return Mirror(place) if storage.is_remote(place) else Folder(Path(place))


def fetched(path: str) -> Path:
    """Where an argument's finished directory lies here.  Raises Refused if it is in a store and not finished there."""
    return at(storage.resolve(path)).fetch()


class Folder:
    """An output directory that stays where it is worked on: a Mirror of nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with program.only_writer(self.directory):
            yield

    def fetch(self) -> Path:
        return self.directory

    def send(self) -> None: ...
    def bring_checkpoints(self) -> None: ...
    def keep_checkpoints(self, only_add: bool = False) -> None: ...


class Mirror(Folder):
    """One output directory below 's3://bucket/prefix', and the folder where it is worked on."""

    def __init__(self, place: str) -> None:
        """Raises WrongParameters for what is no such address."""
        self.remote = Prefix(place)
        self._lease: Lease | None = None
        super().__init__(
            storage.cache_folder() / "work" / manifest.digest_of(self.remote.address)[: storage.KEY_DIGITS]
        )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer, here and there.  Raises Preempted (run again) while another process is."""
        with program.only_writer(self.directory), self._lease_of_the_dead_runs_out() as self._lease:
            yield

    @contextlib.contextmanager
    def _lease_of_the_dead_runs_out(self) -> Iterator[Lease]:
        """A pod that was killed leaves its lease; whoever comes at once waits for it, instead of being a failure."""
        until = time.monotonic() + 1.5 * EXPIRY_SECONDS
        me = f"process {os.getpid()} of {socket.gethostname()}"
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    lease = stack.enter_context(Lease(self.remote, me, EXPIRY_SECONDS))
                    break
                except Preempted as taken:
                    if time.monotonic() > until:
                        raise
                    log.info("%s", taken)
                    time.sleep(EXPIRY_SECONDS / 4)
            yield lease

    def fetch(self) -> Path:
        """Bring a finished directory and return where it lies.  Raises Refused if it is not finished, or damaged."""
        raw = self.remote.get(manifest.NAME)
        if raw is None:
            raise Refused(f"{self.remote.where(manifest.NAME)}: missing, so it is not finished. Run its stage.")
        self._bring(raw, "")
        return self.directory

    def send(self) -> None:
        """Keep the finished directory there, and nothing else."""
        raw = (self.directory / manifest.NAME).read_bytes()
        if self.remote.get(manifest.NAME) == raw:
            return
        self._expect_lease()
        self.remote.delete(manifest.NAME)  # it would vouch for files that are being replaced
        self._send("")
        kept = {PurePosixPath(entry["path"]).parts[0] for entry in self._entries(raw, "")}
        for name in set(self._steps_there()) - kept:
            self._delete(name)

    def bring_checkpoints(self) -> None:
        """The finished training, or the newest checkpoint that arrives whole, and the best that it speaks of.

        Those that do not are named and passed over, as a local one would be.
        """
        if self.remote.get(manifest.NAME) is not None:
            self.fetch()
            return
        for name in reversed(self._steps_there()):
            try:
                self._bring_step(name)
                best = json.loads((self.directory / name / "state.json").read_bytes())["best_step"]
                if best and (best_name := step_name(best)) != name:
                    self._bring_step(best_name)
            except (Refused, ValueError, KeyError, TypeError) as damage:
                log.warning("checkpoint refused: %s: %s", self.remote.where(name), damage)
            else:
                return

    def keep_checkpoints(self, only_add: bool = False) -> None:
        """Keep there the checkpoints that are here.  A store that is away is told of, and caught up with next time.

        only_add: while it is not known yet whether what is there is this run's.
        """
        self._expect_lease()
        try:
            finished = (self.directory / manifest.NAME).exists()
            if not only_add and not finished:  # a manifest there vouches for files that go now
                self.remote.delete(manifest.NAME)
            here = {path.name for path in self.directory.glob("step-*") if STEP.fullmatch(path.name)}
            there = set(self._steps_there())
            for name in sorted(here - there):
                if (self.directory / name / manifest.NAME).exists():  # else it arrived in part
                    self._send(f"{name}/")
            for name in set() if only_add else there - here:
                self._delete(name)
        except Unreachable as away:
            log.warning("the checkpoints since then are in %s alone: %s", self.directory, away)

    def _expect_lease(self) -> None:
        """Raise Preempted if another process has taken the place over."""
        if self._lease:
            self._lease.check()

    def _bring_step(self, name: str) -> None:
        raw = self.remote.get(f"{name}/{manifest.NAME}")
        if raw is None:
            raise Refused("it has no manifest.json")
        self._bring(raw, f"{name}/")

    def _bring(self, raw: bytes, below: str) -> None:
        for entry in self._entries(raw, below):
            self._bring_file(entry)
        manifest.write_atomically(self.directory / below / manifest.NAME, lambda file: file.write(raw))

    def _bring_file(self, entry: dict[str, Any]) -> None:
        for _ in range(ARRIVALS):
            with contextlib.suppress(Refused):
                return manifest.verify_file(self.directory, entry)
            # beside the folder of a checkpoint: what is left there by a kill would make that one no good
            arrival = self.directory / f"arriving-{uuid.uuid4().hex[:12]}"
            manifest.write_atomically(arrival, lambda file: self.remote.fetch(entry, file))
            (self.directory / entry["path"]).parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrival, self.directory / entry["path"])
        return manifest.verify_file(self.directory, entry)

    def _send(self, below: str) -> None:
        """The files of the manifest below here, and then that."""
        raw = (self.directory / below / manifest.NAME).read_bytes()
        for entry in self._entries(raw, below):
            if not self.remote.holds(entry):
                self.remote.put_file(entry["path"], self.directory / entry["path"], entry)
        self.remote.put_bytes(below + manifest.NAME, raw)

    def _entries(self, raw: bytes, below: str) -> list[dict[str, Any]]:
        """Of a manifest's files, by their paths in the whole directory.  Raises Refused for one that leads outside."""
        where = self.remote.where(below + manifest.NAME)
        entries = manifest.parse(raw, manifest.schema_of(raw), where)["files"]
        for entry in entries:
            parts = PurePosixPath(entry["path"]).parts
            if ".." in parts or entry["path"].startswith("/"):
                raise Refused(f"{where}: lists {entry['path']!r}, which lies outside. No stage wrote it.")
        return [{**entry, "path": below + entry["path"]} for entry in entries]

    def _steps_there(self) -> list[str]:
        """Checkpoints that are whole there, rising."""
        folders = [name for name in self.remote.folders() if STEP.fullmatch(name)]
        return sorted(name for name in folders if self.remote.head(f"{name}/{manifest.NAME}"))

    def _delete(self, name: str) -> None:
        """Take a checkpoint away, its manifest first."""
        self.remote.delete(f"{name}/{manifest.NAME}")
        for file in Prefix(f"{self.remote.address}/{name}").names():
            self.remote.delete(f"{name}/{file}")
