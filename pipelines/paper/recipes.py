"""The runs of a study: a recipe and a seed each, in an order in which every run finds its first weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.evaluate.published import CONFIGURATIONS, Scale
from pipelines.paper.table import Key, belongs
from runtime.errors import WrongParameters
from vgg.evaluation.modes import modes_of
from vgg.params import load_all
from vgg.params.evaluate import EvaluateParams
from vgg.params.train import TrainParams

SAME_NETWORK = ("input_size", "classifier_width", "batch_norm")  # of a run and of the one with its first weights


@dataclass(frozen=True)
class Run:
    """name: of its folder.  sections: of params.yaml with the seed, as manifests record them.  before: the run whose
    weights it begins with."""

    name: str
    recipe: Path
    seed: int
    sections: dict[str, Any]
    train: TrainParams
    before: str | None = None
    localises: bool = False

    @property
    def train_scale(self) -> Scale:
        low, high = self.train.scale_range
        return low if low == high else (low, high)

    def keys(self, number: int) -> list[Key]:
        """The rows of a table that its evaluation fills."""
        evaluate = EvaluateParams.model_validate(self.sections["evaluate"])
        if number == 5 and "multi_crop" not in evaluate.methods:
            return []
        keys = [
            Key(self.train.configuration, self.train_scale, mode.scales, mode.method, mode.mirror)
            for mode in modes_of(evaluate)
        ]
        return sorted((key for key in keys if belongs(number, key)), key=str)

    @property
    def tables(self) -> list[int]:
        """Those with a row of it, and Table 6 if a fusion can take its evaluation at several scales."""
        numbers = [number for number in (3, 4, 5) if self.keys(number)]
        return numbers + [6] * (4 in numbers)


def read(paths: Sequence[Path], seeds: Sequence[int], pattern: str = "*.yaml") -> list[Run]:
    """Every recipe with every seed, in order: of a seed, fixed S from small to large, then jitter; from A to E.

    paths: files, or folders, of which recipes of networks that the paper does not have are left out.  seeds: replace
    train.seed; empty for that of the recipe.  shard.seed stays: all runs read the same shards.  pattern: of files in
    folders.
    Raises WrongParameters for wrong recipes, or one whose first weights no other provides.
    """
    files = [file for path in paths for file in (sorted(path.glob(pattern)) if path.is_dir() else [path])]
    runs = []
    for file in dict.fromkeys(files):
        run = _run(file)
        plain = not run.train.batch_norm and run.train.crop == "scale" and not run.localises
        if file in paths or plain:
            runs.append(run)
    if not runs:
        raise WrongParameters(f"--recipes {', '.join(map(str, paths))}: no recipes (*.yaml) there")
    if len({str(run.sections["shard"]) for run in runs}) > 1:
        raise WrongParameters("the sections 'shard' of the recipes differ: a study has one data set. Name its recipes.")
    runs.sort(key=lambda run: _rank(run.train))
    runs = [replace(run, before=_before(run, runs)) for run in runs]
    if not seeds:
        return runs
    return [_seeded(run, seed) for seed in dict.fromkeys(seeds) for run in runs]


def needed(runs: Sequence[Run], number: int) -> list[Run]:
    """Those that fill a row of the table, and those whose weights they begin with."""
    by_name, wanted = {run.name: run for run in runs}, set()
    for run in runs:
        if number in run.tables:
            while run.name not in wanted:
                wanted.add(run.name)
                run = by_name[run.before] if run.before else run
    return [run for run in runs if run.name in wanted]


def _run(file: Path) -> Run:
    from pipelines.arguments import sections

    if not re.fullmatch(r"[\w.-]+", file.stem):
        raise WrongParameters(f"{file}: its name becomes that of a folder: letters, digits, '.', '_' and '-' only")
    checked = load_all(sections(str(file), []), str(file))
    train = checked["train"]
    assert isinstance(train, TrainParams)
    complete = {stage: section.model_dump(mode="json") for stage, section in checked.items()}
    return Run(file.stem, file, train.seed, complete, train, localises="localise" in checked)


def _seeded(run: Run, seed: int) -> Run:
    sections = {**run.sections, "train": {**run.sections["train"], "seed": seed}}
    train = run.train.model_copy(update={"seed": seed})
    before = f"{run.before}-seed{seed}" if run.before else None
    return replace(run, name=f"{run.name}-seed{seed}", seed=seed, sections=sections, train=train, before=before)


def _rank(train: TrainParams) -> tuple[bool, int, int]:
    low, high = train.scale_range
    return low != high, low + high, CONFIGURATIONS.index(train.configuration)


def _before(run: Run, runs: Sequence[Run]) -> str | None:
    """§3.1: deeper networks begin with net A; S = 384 with S = 256 of the same network; jitter with S = 384."""
    if run.train.init not in ("shallower", "checkpoint"):
        return None
    wanted = "A" if run.train.init == "shallower" else run.train.configuration
    found = [one for one in runs if one.train.configuration == wanted and _rank(one.train) < _rank(run.train)]
    if run.train.init == "shallower":
        found = found[:1]
    if not found:
        what = "net A" if run.train.init == "shallower" else f"net {wanted} at a smaller S"
        raise WrongParameters(
            f"{run.recipe}: train.init {run.train.init!r} needs the weights of {what}; add its recipe"
        )
    for name in SAME_NETWORK:
        if getattr(found[-1].train, name) != getattr(run.train, name):
            raise WrongParameters(
                f"{run.recipe}: train.{name} is not that of {found[-1].recipe}, whose weights it needs"
            )
    return found[-1].name
