"""A study on this machine: every run in a git worktree of its own, through DVC.

    runs/.lock          held while a study is run
    runs/shards/        a worktree: the shards of all runs, made once
    runs/<run>/         a worktree: params.yaml is the recipe, data/initial the weights of the run before
    runs/<run>.json     written when the worktree is complete: what the run is
    runs/<run>.ended    MLflow shows it as finished

All of them are at the commit at which the study began, and share the project's DVC cache, so that shards are linked
there and not copied, and its MLflow database.  A run is finished when the manifests of its checkpoint and predictions
say that they are of these parameters, data and first weights.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.paper import repro, tracked
from pipelines.paper.recipes import Run
from runtime import manifest
from runtime.errors import Preempted, Refused, WrongParameters

log = logging.getLogger("vgg.paper")

SHARDS, CHECKPOINT, PREDICTIONS = Path("data/shards"), Path("models/vgg"), Path("data/predictions")
GIT_SECONDS = 600


@dataclass(frozen=True)
class Study:
    """project: the repository.  folder: of the study.  images: what sharding reads.  commit: of all worktrees."""

    project: Path
    folder: Path
    images: Path
    commit: str

    @classmethod
    @contextlib.contextmanager
    def opened(cls, project: Path, folder: Path, images: Path) -> Iterator[Study]:
        """The study in the folder, begun if there is none; one process at a time.

        Raises WrongParameters without a git repository, Preempted if another process, or a run that it left behind, is
        still at work.
        """
        if _git(project, "rev-parse", "--git-dir", check=False) is None:
            raise WrongParameters(f"{project}: not a git repository, and every run has a git worktree of its own")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Preempted(
                    f"{folder}: a study is being run there, or a run of one that was killed is still at work. "
                    "Wait for its end, then run the same command again."
                ) from None
            repro.inherited_lock(lock.fileno())
            yield cls(project, folder, images, _commit(project, folder))

    def run(self, runs: Sequence[Run]) -> None:
        """All runs, one after another; those that are finished are passed over.  Raises the Problem of the first that
        fails: the results of the others are kept."""
        self._make_shards(runs[0])
        for number, run in enumerate(runs, 1):
            state = f"run {number} of {len(runs)}: {run.name}"
            if self.finished(run):
                log.info("%s is finished", state)
                self._end(run)
                continue
            log.info("%s", state)
            worktree = self._prepare(run)
            repro.repro(worktree, self.project, run.name, "train", "evaluate")
            if not self.finished(run):
                raise Refused(f"{worktree}: dvc repro has succeeded, and yet the results are not those of this run")
            self._end(run)

    def finished(self, run: Run) -> bool:
        """Whether checkpoint and predictions are those of the run's parameters, shards and first weights."""
        worktree = self.folder / run.name
        self._expect_same(run)
        trained, evaluated = _manifest(worktree / CHECKPOINT), _manifest(worktree / PREDICTIONS)
        if not trained or not evaluated or not (worktree / "metrics/evaluate.json").is_file():
            return False
        made = trained["run"]
        return (
            made["train"] == run.sections["train"]
            and made["data"]["digest"] == self._shards_digest()
            and made.get("initial") == (self._weights(run.before) if run.before else None)
            and evaluated["evaluate"] == run.sections["evaluate"]
            and evaluated["inputs"]["weights_sha256"] in weights_of(worktree / CHECKPOINT)
        )

    def _end(self, run: Run) -> None:
        """In MLflow, once; also of a run that went on to its end when this program was killed."""
        marker = self.folder / f"{run.name}.ended"
        if not marker.exists() and tracked.end(_digest(self.folder / run.name / PREDICTIONS), self.project):
            marker.touch()

    def _make_shards(self, run: Run) -> None:
        """Images are links, and DVC does not look into linked folders: so the run cache, which would take shards of
        other images for these, is not asked."""
        if self._shards_digest():
            return
        worktree, marker = self.folder / "shards", self.folder / "shards.json"
        if not marker.exists():
            self._add_worktree(worktree, run.sections)
            for path in sorted(self.images.iterdir()) if self.images.is_dir() else []:
                link = worktree / "data/images" / path.name
                if path.name != "README.md" and not path.name.endswith(".dvc"):
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path.resolve())
            manifest.write_json(marker, {"images": str(self.images)})
        repro.repro(worktree, self.project, "shards", "--no-run-cache", "shard")

    def _shards_digest(self) -> str:
        """Empty if they are not finished."""
        worktree = self.folder / "shards"
        return _digest(worktree / SHARDS) if (worktree / "metrics/shard.json").is_file() else ""

    def _prepare(self, run: Run) -> Path:
        """The run's worktree, complete: parameters, shards, first weights."""
        worktree, marker = self.folder / run.name, self.folder / f"{run.name}.json"
        if marker.exists():
            return worktree
        self._add_worktree(worktree, run.sections)
        lock = _yaml().load((self.folder / "shards/dvc.lock").read_text(encoding="utf-8"))
        lock["stages"] = {"shard": lock["stages"]["shard"]}  # so that DVC knows the shards without making them
        _dump(lock, worktree / "dvc.lock")
        repro.dvc(worktree, self.project, "checkout", "--quiet", str(SHARDS))
        if run.before:
            before = self.folder / run.before / CHECKPOINT
            shutil.copytree(before, worktree / "data/initial", dirs_exist_ok=True, copy_function=_link)
        manifest.write_json(marker, _description(run))
        return worktree

    def _add_worktree(self, worktree: Path, sections: dict[str, Any]) -> None:
        if worktree.exists():  # killed before it was complete
            shutil.rmtree(worktree)
        _git(self.project, "worktree", "prune")
        _git(self.project, "worktree", "add", "--quiet", "--detach", str(worktree), self.commit)
        (worktree / "dvc.lock").unlink(missing_ok=True)  # of the project's last run
        _dump(sections, worktree / "params.yaml")
        repro.share_cache(worktree, self.project)

    def _expect_same(self, run: Run) -> None:
        """Raises Refused if the run's folder was made for another one."""
        marker = self.folder / f"{run.name}.json"
        if not marker.exists():
            return
        made, wanted = json.loads(marker.read_bytes()), _description(run)
        if made != wanted:
            changed = [name for name in wanted if made.get(name) != wanted[name]]
            worktree = self.folder / run.name
            raise Refused(
                f"{worktree}: made with another recipe ({', '.join(changed)} differ). Name another --folder, or remove "
                f"this run: git worktree remove --force {worktree} && rm {worktree}.*"
            )

    def _weights(self, name: str) -> str | None:
        """sha256 of the last weights of a finished training, with which others begin."""
        found = weights_of(self.folder / name / CHECKPOINT)
        return found[0] if found else None


def weights_of(checkpoint: Path) -> list[str]:
    """sha256 of the last and the best weights; empty if training is not finished."""
    found = _manifest(checkpoint)
    entries = {entry["path"]: entry["sha256"] for entry in found["files"]} if found else {}
    return [str(entries[f"{found[step]}/weights.safetensors"]) for step in ("last", "best")] if found else []


def _manifest(directory: Path) -> dict[str, Any] | None:
    """The verified manifest of a finished directory, or None."""
    try:
        raw = (directory / manifest.NAME).read_bytes()
        return manifest.parse(raw, manifest.schema_of(raw), str(directory))
    except (OSError, Refused):
        return None


def _digest(directory: Path) -> str:
    """Of a finished directory, as in dvc.lock; empty if it is not finished."""
    found = _manifest(directory)
    return manifest.directory_digest(directory, found) if found else ""


def _description(run: Run) -> dict[str, Any]:
    return {"train": run.sections["train"], "evaluate": run.sections["evaluate"], "before": run.before}


def _commit(project: Path, folder: Path) -> str:
    """At which the study began.  Uncommitted changes are not part of it."""
    head, marker = str(_git(project, "rev-parse", "HEAD")).strip(), folder / "study.json"
    if not marker.exists():
        manifest.write_json(marker, {"commit": head})
    commit = str(json.loads(marker.read_bytes())["commit"])
    if commit != head:
        log.warning("%s: the study goes on at commit %s, not at the present one", folder, commit[:12])
    if _git(project, "status", "--porcelain", "--untracked-files=no", "--", ":!dvc.lock", ":!metrics", ":!params.yaml"):
        log.warning("uncommitted changes are not part of the study: it runs commit %s", commit[:12])
    return commit


def _git(project: Path, *arguments: str, check: bool = True) -> str | None:
    """What git prints; None if it fails and that is allowed.  Raises Refused."""
    done = subprocess.run(
        ["git", "-C", str(project), *arguments], capture_output=True, timeout=GIT_SECONDS, encoding="utf-8",
        errors="backslashreplace", check=False,
    )  # fmt: skip
    if done.returncode and check:
        raise Refused(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return None if done.returncode else done.stdout


def _link(source: str, target: str) -> None:
    """A file of a finished checkpoint does not change: a link takes no space.  Copied to another file system."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    return yaml


def _dump(document: Any, path: Path) -> None:
    text = io.StringIO()
    _yaml().dump(document, text)
    manifest.write_atomically(path, lambda file: file.write(text.getvalue().encode()))
