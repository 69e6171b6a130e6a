"""What has been evaluated, kept until all is: a killed evaluation goes on from its parts."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import manifest
from vgg.evaluation.predictions import row_type

log = logging.getLogger("vgg.evaluate")


def part_type(num_modes: int, num_classes: int) -> np.dtype[Any]:
    """An image: its row (row_type), and the posteriors of every mode."""
    return np.dtype([("row", row_type(num_modes)), ("posteriors", "<f2", (num_modes, num_classes))])


class Parts:
    """Evaluated images, in files or, without a folder, in memory.

    folder: of the evaluation's own; what is in it of another evaluation is deleted.  identity: digest of everything
    that determines the numbers.  A file is called by the digest of its content; one that is damaged counts as missing.
    """

    def __init__(self, folder: Path | None = None, identity: str = "") -> None:
        self._folder, self._identity = folder, identity
        self._parts: list[NDArray[np.void]] = []

    def open(self, dtype: np.dtype[Any]) -> None:
        """Take up the parts of an earlier process.  dtype: part_type."""
        if self._folder is None:
            return
        mine = self._folder / self._identity[:16]
        for other in self._folder.iterdir() if self._folder.is_dir() else ():
            if other != mine:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        for path in sorted(mine.glob("*.npy")):
            raw = path.read_bytes()
            if hashlib.sha256(raw).hexdigest() != path.stem:
                log.warning("%s: damaged; its images are evaluated again", path)
                path.unlink()
                continue
            part = np.load(path, mmap_mode="r", allow_pickle=False)
            if part.dtype == dtype:
                self._parts.append(part)
        if self._parts:
            log.info("continuing: %s images were evaluated before", f"{sum(map(len, self._parts)):,}")

    def add(self, part: NDArray[np.void]) -> None:
        """Raises StorageFailure when the disk is full."""
        if self._folder is None or not len(part):
            self._parts.append(part)
            return
        file = io.BytesIO()
        np.save(file, part, allow_pickle=False)
        path = self._folder / self._identity[:16] / f"{hashlib.sha256(file.getbuffer()).hexdigest()}.npy"
        manifest.write_atomically(path, lambda to: to.write(file.getbuffer()))
        self._parts.append(np.load(path, mmap_mode="r", allow_pickle=False))

    def numbers(self) -> NDArray[np.uint32]:
        """Of the images evaluated."""
        return np.concatenate([np.zeros(0, np.uint32), *(part["row"]["number"] for part in self._parts)])

    def rows(self) -> NDArray[np.void]:
        """Rows of all images, by number."""
        rows = np.concatenate([part["row"] for part in self._parts])
        return rows[np.argsort(rows["number"])]

    def posteriors(self, mode: int) -> NDArray[np.float16]:
        """Of all images in a mode, by number: float16 (images, classes)."""
        found = np.concatenate([part["posteriors"][:, mode] for part in self._parts])
        return found[np.argsort(self.numbers())]

    def delete(self) -> None:
        """Delete the files."""
        self._parts = []
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
