"""Rows of the paper's tables from finished evaluations: ours beside the paper's, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from components.evaluate.published import (
    CONFIGURATIONS,
    NUM_IMAGES,
    TABLE_6,
    TABLES,
    TITLES,
    Scale,
    is_of,
    shown_scale,
)
from pipelines.paper.found import Evaluation
from runtime.errors import Refused, WrongParameters

OPTIONS = ("average", "softmax", "filter", "ceil_pooling")  # of section evaluate: they change a result, not its row
METHODS = {3: ("dense",), 4: ("dense",), 5: ("dense", "multi_crop", "multi_crop_and_dense"), 6: ("fusion",)}


@dataclass(frozen=True)
class Key:
    """What a row is about.  members: of a fusion, shown instead of configuration and S."""

    configuration: str
    train_scale: Scale | None
    test_scales: tuple[int, ...]
    method: str
    mirror: bool = True
    imported: bool = False
    members: tuple[tuple[str, Scale | None], ...] = ()

    def named(self) -> str:
        """In a message: D S=[256;512] Q=256,384,512 multi_crop."""
        if self.members:
            return f"{shown_members(self.members)} {self.method}"
        parts = [self.configuration]
        parts += [f"S={shown_scale(self.train_scale)}"] * (self.train_scale is not None)
        parts += [f"Q={','.join(map(str, self.test_scales))}"] * bool(self.test_scales)
        return " ".join([*parts, self.method] if self.method != "dense" else parts)


@dataclass(frozen=True)
class Row:
    """results: of each network (seed), as in evaluate.json.  paper: top-1 and top-5 error in %, if it has the row."""

    key: Key
    results: tuple[dict[str, Any], ...] = ()
    paper: tuple[float, float] | None = None
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """comparable: on the paper's validation images, so that its numbers stand beside ours.  unused: evaluations
    without a row in it, or with the same weights as another one's in all their rows."""

    number: int
    dataset: str
    data_digest: str
    num_images: int
    comparable: bool
    unused: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        data = "ILSVRC-2012 validation" if self.comparable else f"NOT ImageNet: {self.dataset}"
        return f"{TITLES[self.number]} ({data}, {self.num_images:,} images)"

    @property
    def missing(self) -> list[str]:
        return [row.key.named() for row in self.rows if not row.results]


def make(number: int, found: Sequence[Evaluation], wanted: Iterable[Key] = (), imagenet: bool = False) -> Table:
    """The table with this number.

    wanted: rows that are expected besides, for data other than ImageNet.  imagenet: the user says that a data set of
    another source (a folder, parquet files) is ILSVRC-2012's.
    Raises Refused if the same weights have two different results for a row, WrongParameters for a false `imagenet`.
    """
    groups = _grouped(number, found)
    counts = {mode["num_images"] for evaluation in found for mode in evaluation.metrics["modes"].values()}
    dataset = str(found[0].metrics["dataset"])
    if imagenet and counts != {NUM_IMAGES}:
        raise WrongParameters(
            f"--imagenet: the validation set of ILSVRC-2012 has {NUM_IMAGES:,} images, these evaluations "
            f"{', '.join(f'{count:,}' for count in sorted(counts))}. Leave it out."
        )
    comparable = imagenet or all(is_of(dataset, count) for count in counts)
    used = {evaluation.path for group in groups.values() for evaluation, _ in group.values()}
    unused = tuple(str(evaluation.path) for evaluation in found if evaluation.path not in used)
    table = Table(number, dataset, str(found[0].metrics["data_digest"]), max(counts), comparable, unused)
    expected = dict.fromkeys(wanted) if not comparable else {}
    paper = _published(number) if comparable else {}
    keys = [*paper, *expected, *groups]
    if not paper and not expected:
        keys += _unseen(number, groups)
    for key in sorted(dict.fromkeys(keys), key=_order):
        results = groups.get(key, {})
        published = paper.get(_as_published(key))
        if key.imported or results or not any(_as_published(other) == key for other in groups if other.imported):
            paths = tuple(str(evaluation.path) for evaluation, _ in results.values())
            table.rows.append(Row(key, tuple(result for _, result in results.values()), published, paths))
    return table


def _grouped(number: int, found: Sequence[Evaluation]) -> dict[Key, dict[str, tuple[Evaluation, dict[str, Any]]]]:
    """By row and weights: the evaluation and the result."""
    groups: dict[Key, dict[str, tuple[Evaluation, dict[str, Any]]]] = {}
    for evaluation in found:
        for result in evaluation.metrics["modes"].values():
            key = key_of(evaluation, result)
            if not belongs(number, key, evaluation):
                continue
            group = groups.setdefault(key, {})
            weights = str(evaluation.metrics["weights_sha256"])
            for other, known in group.values():
                _expect_same_options(key, other, evaluation)
                if other.metrics["weights_sha256"] == weights and known["top1_error"] != result["top1_error"]:
                    raise Refused(
                        f"two results for {key.named()} of the same weights, {weights[:16]}…: {other.path} and "
                        f"{evaluation.path}. Their options or code differ. Give --runs only one of them."
                    )
            group.setdefault(weights, (evaluation, result))
    return groups


def _expect_same_options(key: Key, one: Evaluation, other: Evaluation) -> None:
    """Seeds of a row are evaluated alike.  Only manifests tell the options."""
    first, second = one.manifest.get("evaluate", {}), other.manifest.get("evaluate", {})
    if changed := [name for name in OPTIONS if name in first and name in second and first[name] != second[name]]:
        values = ", ".join(f"{name} {first[name]} and {second[name]}" for name in changed)
        raise Refused(
            f"{key.named()}: {one.path} and {other.path} were evaluated with other options: {values}. "
            "Give --runs only those of one kind."
        )


def key_of(evaluation: Evaluation, result: dict[str, Any]) -> Key:
    protocol = result["protocol"]
    mirror = bool(protocol["mirror"])
    if protocol["method"] == "fusion":
        return _fusion(evaluation.members, evaluation.fused_method, mirror)
    return Key(
        evaluation.configuration,
        evaluation.train_scale,
        tuple(protocol["scales"]),
        str(protocol["method"]),
        mirror,
        evaluation.imported,
    )


def belongs(number: int, key: Key, evaluation: Evaluation | None = None) -> bool:
    """Whether a result is for the table: Q of Table 3 is S, or 0.5 (Smin + Smax) (§4.1); Table 4 has several Q."""
    if number == 6 or key.members:
        return number == 6 and bool(key.members)
    if key.method not in METHODS[number]:
        return False
    if number == 3:
        return key.test_scales == (middle(key.train_scale),) or (key.train_scale is None and len(key.test_scales) == 1)
    if number == 5 and key.method == "dense" and evaluation is not None:  # only beside multi-crop of the same network
        methods = {mode["protocol"]["method"] for mode in evaluation.metrics["modes"].values()}
        return len(key.test_scales) > 1 and ("multi_crop" in methods or key.train_scale == (256, 512))
    return len(key.test_scales) > 1


def middle(scale: Scale | None) -> int | None:
    """S, or 0.5 (Smin + Smax)."""
    return scale if scale is None or isinstance(scale, int) else sum(scale) // 2


def _published(number: int) -> dict[Key, tuple[float, float]]:
    if number == 6:
        return {_fusion(row.members, row.method): (row.top1_error, row.top5_error) for row in TABLE_6}
    return {
        Key(row.configuration, row.train_scale, row.test_scales, row.method): (row.top1_error, row.top5_error)
        for row in TABLES[number]
    }


def _fusion(members: tuple[tuple[str, Scale | None], ...], method: str, mirror: bool = True) -> Key:
    """Whatever network was evaluated last: a fusion goes by its members."""
    return Key("", None, (), method, mirror, members=tuple(sorted(members, key=str)))


def _as_published(key: Key) -> Key:
    """The key under which the paper has the row: imported weights are compared with it too."""
    return replace(key, imported=False)


def _unseen(number: int, groups: Iterable[Key]) -> list[Key]:
    """A row for every network of the paper's table that has none, of unknown scales."""
    if number == 6:
        return [] if list(groups) else [_fusion((("D", None), ("E", None)), "multi_crop_and_dense")]
    present = {(key.configuration, key.method) for key in groups}
    wanted = dict.fromkeys((row.configuration, row.method) for row in TABLES[number])
    return [Key(name, None, (), method) for name, method in wanted if (name, method) not in present]


def _order(key: Key) -> tuple[Any, ...]:
    name = key.configuration.removesuffix("-BN")
    scale = key.train_scale
    jitter = isinstance(scale, tuple)
    methods = ("dense", "multi_crop", "multi_crop_and_dense")
    return (
        len(key.members) < 7, key.members and str(key.members), CONFIGURATIONS.index(name) if name else 0,
        key.configuration != name, jitter, middle(scale) or 0, key.test_scales,
        methods.index(key.method) if key.method in methods else len(methods), not key.mirror, key.imported,
    )  # fmt: skip


def shown_members(members: tuple[tuple[str, Scale | None], ...]) -> str:
    """D/[256;512] + E/[256;512], as in the paper."""
    return " + ".join(f"{name}/{shown_scale(scale) or '?'}" for name, scale in members)
