"""The frame shared by the four stages: parameters, inputs, identity, output, tracking, results.

A program goes through it in this order:

    stage = Stage("evaluate", args, EvaluateParams)     parameters; all mistakes are reported at once
    shards = stage.open_shards()                        inputs; their digests must match the arguments
    location = stage.location(args.predictions)         {key} becomes the digest of the stage's identity
    with stage.tracked(location) as tracker:            a run in MLflow with parameters and provenance
        …                                               the work of the stage
    stage.finish(metrics, …)                            metrics, written last, and outputs for Kubeflow
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from components import findings, program
from components.closure import fingerprints
from components.tracking import provenance
from components.tracking.address import tracking_uri
from components.tracking.tracker import Tracker, journal_key, output_key
from runtime import manifest
from runtime.errors import WrongParameters
from runtime.shards.shardset import ShardSet
from runtime.store import storage
from vgg.params import Section, load

P = TypeVar("P", bound=Section)
RECORD_SUFFIX = ".record.json"  # of the file beside the metrics
OUTPUT_FILES = ("metrics", "curves", "confusion", "report")  # arguments of the stages; the last files they write


class Stage(Generic[P]):
    """One run of a stage's program.  params: its section.  inputs: digests of the inputs opened so far, by name."""

    def __init__(self, name: str, args: argparse.Namespace, model: type[P]) -> None:
        """Raises WrongParameters with every mistake in the parameters, or for a wrong MLFLOW_TRACKING_URI."""
        self.name, self.args, self._start = name, args, time.monotonic()
        self.params = load(args.params, name, model)
        tracking_uri()  # checked before any work
        self.inputs: dict[str, str] = {}
        self._expect_writable()

    def _expect_writable(self) -> None:
        """Raises WrongParameters, before the work, if a file that the stage writes at its end cannot be written."""
        for flag in OUTPUT_FILES:
            if not (argument := getattr(self.args, flag, None)):
                continue
            path = Path(argument)
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                what = "is a folder" if path.is_dir() else f"{folder} is not a writable folder"
                raise WrongParameters(f"--{flag} {path}: {what}. Give the path of a file in a writable folder.")

    def open_shards(self) -> ShardSet:
        """The shards of --shards.  Raises Refused if they are damaged or do not match the argument's digest."""
        shards = storage.open_shards(self.args.shards)
        self.expect("shards", self.args.shards, shards.digest)
        return shards

    def expect(self, name: str, argument: str, digest: str) -> None:
        """Record an input's digest.  Raises Refused if it does not match the argument's."""
        storage.expect(argument, digest)
        self.inputs[name] = digest

    @cached_property
    def code(self) -> dict[str, str]:
        """Fingerprint of every file of the science."""
        return fingerprints(self.name)

    def identity(self) -> dict[str, Any]:
        """Everything that determines the result: parameters, inputs, and the code of the science."""
        return {self.name: self.params.model_dump(), "code": self.code, **self.inputs}

    def location(self, output: str) -> str:
        """The resolved location of the output argument; lists too long for a message are written beside it."""
        location = storage.resolve(output, self.identity())
        findings.beside(location, self.args.metrics)
        return location

    @cached_property
    def record(self) -> dict[str, Any]:
        """The provenance record, with the inputs opened until its first use."""
        return provenance.record(self.name, self.params.model_dump(mode="json"), self.inputs)

    def record_of(self, stage: str, output: str, digest: str) -> dict[str, Any] | None:
        """The record of an earlier stage, if it is beside this one's metrics and of what this one was given.

        output: name of the earlier stage's output; digest: of it.
        """
        path = Path(self.args.metrics).with_name(f"{stage}{RECORD_SUFFIX}")
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
            return found if found["finished"] and found["results"][output].endswith(f"#{digest}") else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # another place, another run, or damaged: the page says less

    def tracked(self, location: str, more_params: dict[str, Any] | None = None) -> Tracker:
        """A context manager: the stage's run in MLflow, with parameters and provenance.

        location: of the output.  more_params: of earlier stages, by stage name.
        """
        tracker = Tracker(
            self.name, journal_key(self.identity(), location), provenance.lineage(self.args.params),
            work=manifest.digest_of(self.identity()), output=output_key(location),
        )  # fmt: skip
        tracker.params({self.name: self.params.model_dump(mode="json"), **(more_params or {})})
        tracker.tags(provenance.tags(self.record))
        return tracker

    def track_shards(self, tracker: Tracker, shards: ShardSet, split: str, context: str) -> None:
        """Log shards as a data set of the run in MLflow."""
        profile = {"num_images": len(shards.split(split)), "num_classes": len(shards.wnids)}
        tracker.dataset(shards.manifest["dataset"], self.args.shards, shards.digest, context, profile)

    def made(self, tracker: Tracker, output: str, location: str, digest: str) -> None:
        """Tag the run with what it made, and where: by the digest it is found from what was made of it."""
        tracker.tags({f"vgg.result.{output}": digest, f"vgg.address.{output}": storage.address(location, digest)})

    def write_dvc_metrics(self, metrics: dict[str, Any], *names: str) -> None:
        """Write those that one compares, for DVC's tables: all of them, with hashes and modes, would be too wide."""
        if path := self.args.dvc_metrics:
            manifest.write_json(Path(path), {name: metrics[name] for name in names})

    def finish(
        self,
        metrics: dict[str, Any],
        parameters: dict[str, str],
        artifacts: dict[str, tuple[str, dict[str, Any]]] | None = None,
    ) -> None:
        """Write the metrics, the last file, and report output parameters and artifacts to Kubeflow.

        The provenance record, with the addresses of the outputs, is written beside the metrics, so it is there without
        MLflow.  Not into them: they have the same bytes on every machine.
        """
        results = {name: address for name, address in parameters.items() if storage.DIGEST.search(address)}
        record_file = Path(self.args.metrics).with_suffix(RECORD_SUFFIX)
        hours = (time.monotonic() - self._start) / 3600
        when = {"finished": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "hours_since_last_start": hours}
        manifest.write_json(record_file, {**self.record, "results": results, **when})
        manifest.write_json(Path(self.args.metrics), metrics)
        findings.clear()
        shown = {"metrics": (self.args.metrics, program.numbers(metrics)), **(artifacts or {})}
        program.write_executor_output(self.args.executor_output, parameters, shown)
