"""Finds finished evaluations: metrics files (evaluate.json) and manifests of predictions, in any folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.paper.published import Scale
from runtime import manifest
from runtime.errors import BadData, Refused
from runtime.wording import listing

METRICS = "evaluate.json"
PREDICTIONS_SCHEMA = "vgg.predictions/"
# nothing of an evaluation is in them, and ImageNet has a million files
SKIPPED = {".git", ".dvc", ".venv", ".tracking", "images", "shards", "initial", "models", "posteriors", "mlruns"}
REQUIRED = ("modes", "weights_sha256", "data_digest", "classes_sha256", "dataset", "training")
OF_TRAINING = ("configuration", "batch_norm", "train_scale", "source")
OF_MODE = ("num_images", "top1_error", "top1_interval", "top5_error", "top5_interval", "protocol")
OF_PROTOCOL = ("method", "scales", "mirror")


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.  path: its metrics file or manifest.  metrics: as in evaluate.json.

    params: section evaluate, which only a manifest has; else empty.
    """

    path: Path
    metrics: dict[str, Any]
    params: dict[str, Any]

    @property
    def configuration(self) -> str:
        training = self.metrics["training"]
        return f"{training['configuration']}{'-BN' * bool(training['batch_norm'])}"

    @property
    def train_scale(self) -> Scale | None:
        """S; None if it is not known, as of some imported weights."""
        scale = self.metrics["training"]["train_scale"]
        if isinstance(scale, list):
            return (scale[0], scale[1]) if scale[0] != scale[1] else scale[0]
        return scale if scale is None else int(scale)

    @property
    def imported(self) -> bool:
        return bool(self.metrics["training"]["source"] == "imported")

    def fused(self) -> tuple[tuple[tuple[str, Scale | None], ...], str]:
        """Configuration and S of the networks of its fusion, and the method of the posteriors that were averaged.

        A partner whose predictions are not there any more is ("?", None).
        """
        members = [(self.configuration, self.train_scale)]
        for folder in self.params.get("fuse", []):
            found = [
                path for base in (self.path.parents[2], Path()) if (path := base / folder / manifest.NAME).is_file()
            ]
            partner = _read(found[0]) if found else None
            members.append((partner.configuration, partner.train_scale) if partner else ("?", None))
        methods = self.params.get("methods", [])
        both = {"dense", "multi_crop"} <= set(methods)
        return tuple(members), "multi_crop_and_dense" if both else methods[-1] if methods else "fusion"


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
    _expect_one_data_set(found)
    return _without_copies(found)


def _files(start: Path) -> Iterator[Path]:
    if start.is_file():
        yield start
    if not start.exists():
        raise BadData(f"--runs {start}: no such file or folder")
    for folder, names, files in os.walk(start):
        names[:] = sorted(set(names) - SKIPPED)
        for name in (manifest.NAME, METRICS):  # a manifest says more: the parameters
            if name in files:
                yield Path(folder, name)


def _read(path: Path) -> Evaluation | None:
    """None for a manifest of something else.  Raises BadData for a file that is damaged or lacks what a table needs."""
    raw = path.read_bytes()
    params = {}
    try:
        content = json.loads(raw)
        if path.name == manifest.NAME:
            schema = manifest.schema_of(raw)
            if not schema.startswith(PREDICTIONS_SCHEMA):
                return None
            content = manifest.parse(raw, schema, str(path))
            params = content["evaluate"]
            content = {**content["inputs"], **content["metrics"]}
        _expect_complete(content, path)
    except Refused as damaged:
        raise BadData(str(damaged)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadData(f"{path}: not the metrics of an evaluation ({error!r}). Evaluate again.") from None
    return Evaluation(path, content, params)


def _expect_complete(metrics: dict[str, Any], path: Path) -> None:
    missing = [name for name in REQUIRED if name not in metrics]
    missing += [f"training.{name}" for name in OF_TRAINING if name not in metrics.get("training", {})]
    for mode, result in metrics.get("modes", {}).items():
        missing += [f"modes.{mode}.{name}" for name in OF_MODE if name not in result]
        protocol = result.get("protocol", {})
        missing += [f"modes.{mode}.protocol.{name}" for name in OF_PROTOCOL if name not in protocol]
        wrong = [k for k in ("top1_error", "top5_error") if k in result and not 0 <= result[k] <= 1]
        missing += [f"modes.{mode}.{name} from 0 to 1" for name in wrong]
    if missing:
        raise BadData(
            f"{path}: lacks {', '.join(missing[:3])}{' …' * (len(missing) > 3)}: it is of an earlier version or no "
            "evaluation. Evaluate again (dvc repro evaluate), or leave it out of --runs."
        )


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
    """A project holds the same numbers twice: as its metrics file and beside the predictions."""
    kept: dict[str, Evaluation] = {}
    for evaluation in found:
        kept.setdefault(
            manifest.digest_of([evaluation.metrics["weights_sha256"], evaluation.metrics["modes"]]), evaluation
        )
    return list(kept.values())
