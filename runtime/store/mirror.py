"""Output directories in an object store, mirrored in a local folder.

Downloads are verified by the manifests.  manifest.json is transferred last in both directions, so on both sides a
directory with one is finished.  Checkpoints are uploaded one by one during training; a run that continues on another
node first downloads the newest complete one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from runtime import manifest
from runtime.checkpoint import step_name
from runtime.errors import Preempted, Refused, Unreachable
from runtime.store import storage
from runtime.store.lease import Lease, this_process
from runtime.store.s3 import Prefix
from runtime.targets import Output, only_writer

log = logging.getLogger("vgg")

EXPIRY_SECONDS = 60.0  # of the lease
DOWNLOADS = 3  # of a file whose content does not fit its manifest
STEP = re.compile("step-[0-9]{8}")  # a checkpoint's folder, as step_name() calls it


class Mirror(Output):
    """An output directory at 's3://bucket/prefix' and its local folder."""

    def __init__(self, location: str) -> None:
        """Raises WrongParameters for any other address."""
        self.remote = Prefix(location)
        self._lease: Lease | None = None
        super().__init__(
            storage.cache_folder() / "work" / manifest.digest_of(self.remote.address)[: storage.KEY_DIGITS]
        )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the exclusive right to write, on both sides.  Raises Preempted while another process has it."""
        with only_writer(self.directory), self._lease_when_free() as self._lease:
            yield

    @contextlib.contextmanager
    def _lease_when_free(self) -> Iterator[Lease]:
        """The lease.  A pod that restarts at once waits until the lease of the killed one has expired."""
        until = time.monotonic() + 1.5 * EXPIRY_SECONDS
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    lease = stack.enter_context(Lease(self.remote, this_process(), EXPIRY_SECONDS))
                    break
                except Preempted as taken:
                    if time.monotonic() > until:
                        raise
                    log.info("%s", taken)
                    time.sleep(EXPIRY_SECONDS / 4)
            yield lease

    def download(self) -> Path:
        """Download the finished directory; returns its local folder.  Raises Refused if unfinished or damaged."""
        raw = self.remote.get(manifest.NAME)
        if raw is None:
            raise Refused(f"{self.remote.where(manifest.NAME)}: missing, so it is not finished. Run its stage.")
        self._download(raw, "")
        return self.directory

    def upload(self) -> None:
        """Upload the finished directory; checkpoints that do not belong to it are deleted from the store."""
        raw = (self.directory / manifest.NAME).read_bytes()
        if self.remote.get(manifest.NAME) == raw:
            return
        self._expect_lease()
        self.remote.delete(manifest.NAME)  # it does not fit the files that are being replaced
        self._upload("")
        uploaded = {PurePosixPath(entry["path"]).parts[0] for entry in self._entries(raw, "")}
        for name in set(self._remote_steps()) - uploaded:
            self._delete(name)

    def download_checkpoints(self) -> None:
        """Download the finished training, or the newest undamaged checkpoint and the best one that it names.

        Damaged ones are reported and skipped, as local ones are.
        """
        if self.remote.get(manifest.NAME) is not None:
            self.download()
            return
        for name in reversed(self._remote_steps()):
            try:
                self._download_step(name)
                best = json.loads((self.directory / name / "state.json").read_bytes())["best_step"]
                if best and (best_name := step_name(best)) != name:
                    self._download_step(best_name)
            except (Refused, ValueError, KeyError, TypeError) as damage:
                log.warning("checkpoint refused: %s: %s", self.remote.where(name), damage)
            else:
                return

    def upload_checkpoints(self, only_add: bool = False) -> None:
        """Make the store's checkpoints the local ones.  If it is unreachable, warn; the next call catches up.

        only_add: delete nothing, while it is unknown whether the store's checkpoints belong to this run.
        """
        self._expect_lease()
        try:
            finished = (self.directory / manifest.NAME).exists()
            if not only_add and not finished:  # a manifest there lists files that are deleted now
                self.remote.delete(manifest.NAME)
            local = {path.name for path in self.directory.glob("step-*") if STEP.fullmatch(path.name)}
            remote = set(self._remote_steps())
            for name in sorted(local - remote):
                if (self.directory / name / manifest.NAME).exists():  # else its download was incomplete
                    self._upload(f"{name}/")
            for name in set() if only_add else remote - local:
                self._delete(name)
        except Unreachable as reason:
            log.warning("the checkpoints since then are only in %s: %s", self.directory, reason)

    def _expect_lease(self) -> None:
        """Raise Preempted if another process has taken the location over."""
        if self._lease:
            self._lease.check()

    def _download_step(self, name: str) -> None:
        raw = self.remote.get(f"{name}/{manifest.NAME}")
        if raw is None:
            raise Refused("has no manifest.json")
        self._download(raw, f"{name}/")

    def _download(self, raw: bytes, below: str) -> None:
        for entry in self._entries(raw, below):
            self._download_file(entry)
        manifest.write_atomically(self.directory / below / manifest.NAME, lambda file: file.write(raw))

    def _download_file(self, entry: dict[str, Any]) -> None:
        for _ in range(DOWNLOADS):
            with contextlib.suppress(Refused):
                return manifest.verify_file(self.directory, entry)
            # outside the checkpoint's folder, which must not contain a leftover of a killed download
            part = self.directory / f"arriving-{uuid.uuid4().hex[:12]}"
            manifest.write_atomically(part, lambda file: self.remote.fetch(entry, file))
            (self.directory / entry["path"]).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, self.directory / entry["path"])
        return manifest.verify_file(self.directory, entry)

    def _upload(self, below: str) -> None:
        """Upload the files of the manifest in the folder `below`, then the manifest."""
        raw = (self.directory / below / manifest.NAME).read_bytes()
        for entry in self._entries(raw, below):
            if not self.remote.holds(entry):
                self.remote.put_file(entry["path"], self.directory / entry["path"], entry)
        self.remote.put_bytes(below + manifest.NAME, raw)

    def _entries(self, raw: bytes, below: str) -> list[dict[str, Any]]:
        """A manifest's files, with paths relative to the whole directory.  Raises Refused for a path outside of it."""
        where = self.remote.where(below + manifest.NAME)
        entries = manifest.parse(raw, manifest.schema_of(raw), where)["files"]
        for entry in entries:
            parts = PurePosixPath(entry["path"]).parts
            if ".." in parts or entry["path"].startswith("/"):
                raise Refused(f"{where}: lists {entry['path']!r}, which is outside. No stage of this program wrote it.")
        return [{**entry, "path": below + entry["path"]} for entry in entries]

    def _remote_steps(self) -> list[str]:
        """Names of the complete checkpoints in the store, in order of their steps."""
        folders = [name for name in self.remote.folders() if STEP.fullmatch(name)]
        return sorted(name for name in folders if self.remote.head(f"{name}/{manifest.NAME}"))

    def _delete(self, name: str) -> None:
        """Delete a checkpoint from the store, its manifest first."""
        self.remote.delete(f"{name}/{manifest.NAME}")
        for file in Prefix(f"{self.remote.address}/{name}").names():
            self.remote.delete(f"{name}/{file}")
