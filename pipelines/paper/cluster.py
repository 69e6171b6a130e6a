"""A study on Kubeflow: every run is a pipeline run, submitted and awaited one after another by pipelines.submit.

What is finished, and where the first weights of the next run are, is read from the store, VGG_STORE: a stage's results
are there under a key made of its parameters, inputs and code.  So a study that was stopped goes on, also on another
machine with the same code; an unfinished run that is still active is found again, and a failed one submitted again
continues from its last checkpoint.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.closure import fingerprints
from pipelines.arguments import IMAGES_VERSION, now
from pipelines.kfp.failure import RunFailed
from pipelines.paper.recipes import Run
from runtime import manifest
from runtime.errors import Refused
from runtime.store import storage
from runtime.store.place import manifest_at

log = logging.getLogger("vgg.paper")


@dataclass(frozen=True)
class Finished:
    """A finished output in the store.  address: with its digest, as a pipeline passes it on.  raw: its manifest."""

    address: str
    digest: str
    content: dict[str, Any]
    raw: bytes

    @property
    def weights(self) -> str:
        """sha256 of the last weights, of a checkpoint."""
        entries = {entry["path"]: entry["sha256"] for entry in self.content["files"]}
        return str(entries[f"{self.content['last']}/weights.safetensors"])


@dataclass(frozen=True)
class Study:
    """folder: gets the manifest of every run's predictions, for the tables.  flags: of pipelines.submit.

    images: the run argument of the same name.
    """

    folder: Path
    flags: Sequence[str]
    images: str

    def run(self, runs: Sequence[Run]) -> None:
        """Raises the Problem of the first run that fails: the results of the others are kept."""
        by_name = {run.name: run for run in runs}
        for number, run in enumerate(runs, 1):
            state = f"run {number} of {len(runs)}: {run.name}"
            if self.keep(run, by_name):
                log.info("%s is finished", state)
                continue
            log.info("%s", state)
            self._submit(run, by_name)
            if not self.keep(run, by_name):
                raise Refused(
                    f"run {run.name} has succeeded, but its predictions are not in the store. Is VGG_STORE the "
                    "cluster's, and is the code the same as in its images?"
                )

    def keep(self, run: Run, by_name: dict[str, Run]) -> bool:
        """Copy the manifest of the run's predictions; False if they are not finished."""
        shards, trained = self._shards(run), self.trained(run, by_name)
        if not shards or not trained:
            return False
        identity = _identity("evaluate", run, shards=shards.digest, checkpoint=trained.digest)
        found = _stored("store:predictions/{key}", identity)
        if found:
            path = self.folder / run.name / manifest.NAME
            manifest.write_atomically(path, lambda file: file.write(found.raw))
        return found is not None

    def trained(self, run: Run, by_name: dict[str, Run]) -> Finished | None:
        """The run's finished checkpoint."""
        shards, inputs = self._shards(run), {}
        if run.before:
            before = self.trained(by_name[run.before], by_name)
            if not before:
                return None
            inputs["initial"] = before.weights
        return (
            _stored("store:checkpoints/{key}", _identity("train", run, shards=shards.digest, **inputs))
            if shards
            else None
        )

    def _shards(self, run: Run) -> Finished | None:
        return _stored("store:shards/{key}", _identity("shard", run, images=self.images))

    def _images_version(self) -> str:
        """One for all runs, so that Kubeflow takes the shards of the second from its cache."""
        path = self.folder / "cluster.json"
        if not path.exists():
            manifest.write_json(path, {IMAGES_VERSION: now()})
        return str(json.loads(path.read_bytes())[IMAGES_VERSION])

    def _submit(self, run: Run, by_name: dict[str, Run]) -> None:
        """Submit and wait.  Raises RunFailed with the run's name; a closed gate is no failure of the evaluation."""
        from pipelines import submit

        params = self.folder / f"{run.name}.params.yaml"
        manifest.write_json(params, run.sections)  # JSON is YAML
        flags = [*self.flags, "--params", str(params), "--wait", "-C", f"images={json.dumps(self.images)}"]
        flags += ["-C", f"{IMAGES_VERSION}={json.dumps(self._images_version())}"]
        if run.before:
            before = self.trained(by_name[run.before], by_name)
            assert before, "the run before is finished"
            flags += ["-C", f"initial={before.address}"]
        try:
            submit.submit(submit.parser().parse_args(flags))
        except RunFailed as failure:
            if not self.keep(run, by_name):
                raise RunFailed(f"run {run.name}: {failure}", failure.exit_code) from None
            log.warning("run %s is evaluated, but was not registered: %s", run.name, failure)


def _identity(stage: str, run: Run, **inputs: str) -> dict[str, Any]:
    """As components.stage.Stage.identity()."""
    return {stage: run.sections[stage], "code": _code(stage), **inputs}


@functools.cache
def _code(stage: str) -> dict[str, str]:
    """At the start of the study; reading it takes a while."""
    return fingerprints(stage)


def _stored(place: str, identity: dict[str, Any]) -> Finished | None:
    """The finished output of a stage with this identity; None if there is none yet.  Raises Refused if damaged."""
    location = storage.resolve(place, identity)
    raw = manifest_at(location)
    if raw is None:
        return None
    content = manifest.parse(raw, manifest.schema_of(raw), f"{location}/{manifest.NAME}")
    digest = manifest.digest_with(raw, content)
    return Finished(storage.address(location, digest), digest, content, raw)
