"""Finds finished evaluations: metrics files (evaluate.json) and manifests of predictions, in any folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.evaluate.published import Scale, scale_of
from runtime import manifest
from runtime.errors import BadData, Refused, WrongParameters
from runtime.wording import listing

METRICS = "evaluate.json"
PREDICTIONS_SCHEMA = "vgg.predictions/"
# nothing of an evaluation is in them, and ImageNet has a million files
SKIPPED = {".git", ".dvc", ".venv", ".tracking", "images", "shards", "initial", "models", "posteriors", "mlruns"}
REQUIRED = ("modes", "weights_sha256", "data_digest", "classes_sha256", "dataset", "training")
OF_TRAINING = ("configuration", "batch_norm", "train_scale", "source")
OF_MODE = ("num_images", "top1_error", "top1_interval", "top5_error", "top5_interval", "protocol")
OF_PROTOCOL = ("method", "scales", "mirror")


Member = tuple[str, Scale | None]  # configuration and S of a network


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.  path: its metrics file or manifest.  metrics: as in evaluate.json.

    identity: of its numbers.  missing: what a table needs and the metrics lack.  manifest: of the predictions; empty
    for a metrics file.
    """

    path: Path
    metrics: dict[str, Any]
    identity: str
    missing: tuple[str, ...]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def configuration(self) -> str:
        return _member(self.metrics["training"])[0]

    @property
    def train_scale(self) -> Scale | None:
        """S; None if it is not known, as of some imported weights."""
        return _member(self.metrics["training"])[1]

    @property
    def imported(self) -> bool:
        return bool(self.metrics["training"]["source"] == "imported")

    @property
    def members(self) -> tuple[Member, ...]:
        """The networks of its fusion."""
        return tuple(_member(network) for network in self.metrics.get("fused", []))

    @property
    def fused_method(self) -> str:
        """Of the posteriors that are averaged: dense, or centre_crop + dense if the networks were evaluated unlike."""
        return " + ".join(sorted({str(network["method"]) for network in self.metrics.get("fused", [])}))


def _member(training: dict[str, Any]) -> Member:
    scale = scale_of(training["train_scale"])
    name = f"{training['configuration']}{'-BN' * bool(training['batch_norm'])}"
    return name, scale[0] if isinstance(scale, tuple) and scale[0] == scale[1] else scale


def find(folders: Sequence[Path]) -> list[Evaluation]:
    """Evaluations in the folders or files, each once: of the same weights with the same modes, the first.

    Raises BadData if there is none or a file is damaged, Refused for evaluations of different data or classes.
    """
    files = list(dict.fromkeys(path.resolve() for folder in folders for path in _files(folder)))
    found = [evaluation for path in files if (evaluation := _read(path))]
    if not found:
        raise BadData(
            f"no finished evaluation in {', '.join(map(str, folders))}: neither {METRICS} nor a folder of predictions. "
            "Run evaluations (dvc repro, or python -m pipelines.paper --run), or check --runs."
        )
    kept = _without_copies(found)
    _expect_one_data_set(kept)
    return kept


def _files(start: Path) -> Iterator[Path]:
    if start.is_file():
        yield start
    if not start.exists():
        raise WrongParameters(f"--runs {start}: no such file or folder. Check the path.")
    for folder, names, files in os.walk(start):
        names[:] = sorted(set(names) - SKIPPED)
        if Path(folder).parts[-2:] == ("metrics", "dvc"):  # the few numbers that DVC's tables show
            continue
        for name in (manifest.NAME, METRICS):  # a manifest says more: the parameters
            if name in files:
                yield Path(folder, name)


def _read(path: Path) -> Evaluation | None:
    """None for a manifest of something else.  Raises BadData for a damaged file, or one that is no evaluation."""
    raw = path.read_bytes()
    recorded: dict[str, Any] = {}
    try:
        metrics = json.loads(raw)
        if path.name == manifest.NAME:
            if not (schema := manifest.schema_of(raw)).startswith(PREDICTIONS_SCHEMA):
                return None
            recorded = manifest.parse(raw, schema, str(path))
            metrics = {"weights_sha256": recorded["inputs"]["weights_sha256"], **recorded["metrics"]}
        identity = manifest.digest_of([metrics["weights_sha256"], metrics["modes"]])
        return Evaluation(path, metrics, identity, tuple(_missing(metrics)), recorded)
    except Refused as damaged:
        raise BadData(str(damaged)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadData(f"{path}: not the metrics of an evaluation ({error!r}). Evaluate again.") from None


def _expect_one_data_set(found: list[Evaluation]) -> None:
    """One table, one validation set: errors of different images do not compare."""
    for name, what in (("data_digest", "data"), ("classes_sha256", "classes")):
        by_value: dict[str, list[Evaluation]] = {}
        for evaluation in found:
            by_value.setdefault(str(evaluation.metrics[name]), []).append(evaluation)
        if len(by_value) > 1:
            each = [
                f"{value}  {group[0].metrics['dataset']}: {group[0].path}"
                f"{f' and {len(group) - 1:,} more' * (len(group) > 1)}"
                for value, group in by_value.items()
            ]
            raise Refused(
                f"evaluations of different {what} do not belong into one table:\n{listing(each)}\n"
                "Give --runs only the folders of one of them.",
                each,
            )


def _without_copies(found: list[Evaluation]) -> list[Evaluation]:
    """A project holds the same numbers twice: its metrics file, and the manifest of the predictions, which has the
    options, too.  Raises BadData if neither says what a table needs."""
    copies: dict[str, list[Evaluation]] = {}
    for evaluation in found:
        copies.setdefault(evaluation.identity, []).append(evaluation)
    kept = []
    for group in copies.values():
        best = min(group, key=lambda one: len(one.missing))
        if best.missing:
            more = " …" * (len(best.missing) > 3)
            raise BadData(
                f"{best.path}: lacks {', '.join(best.missing[:3])}{more}: it is of an earlier version or no "
                "evaluation. Evaluate again (dvc repro evaluate), or leave it out of --runs."
            )
        recorded = next((one for one in group if one.manifest), best)
        kept.append(replace(recorded, metrics=best.metrics))
    return kept


def _missing(metrics: dict[str, Any]) -> list[str]:
    """What a table needs and the metrics lack."""
    missing = [name for name in REQUIRED if name not in metrics]
    missing += [f"training.{name}" for name in OF_TRAINING if name not in metrics.get("training", OF_TRAINING)]
    fused = any(mode.get("protocol", {}).get("method") == "fusion" for mode in metrics["modes"].values())
    if fused and not all({*OF_TRAINING, "method"} <= network.keys() for network in metrics.get("fused", [{}])):
        missing.append("fused")
    for mode, result in metrics["modes"].items():
        missing += [f"modes.{mode}.{name}" for name in OF_MODE if name not in result]
        protocol = result.get("protocol", {})
        missing += [f"modes.{mode}.protocol.{name}" for name in OF_PROTOCOL if name not in protocol]
        wrong = [name for name in ("top1_error", "top5_error") if not 0 <= result.get(name, 0) <= 1]
        missing += [f"modes.{mode}.{name} from 0 to 1" for name in wrong]
    return missing
