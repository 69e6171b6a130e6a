"""Tables 3 to 6 of the paper (arXiv 1409.1556 v6): errors in % on the 50,000 validation images of ILSVRC-2012."""

from __future__ import annotations

from dataclasses import dataclass

Scale = int | tuple[int, int]  # S, or (Smin, Smax) of jitter
JITTER = (256, 512)
NUM_IMAGES = 50_000
SOURCES = ("ilsvrc2012", "kaggle")  # of shard.source: they check that they hold the paper's validation images
CONFIGURATIONS = ("A", "A-LRN", "B", "C", "D", "E")  # from shallow to deep

TITLES = {
    3: "Table 3: single test scale, dense",
    4: "Table 4: several test scales, dense",
    5: "Table 5: dense, multi-crop, and both",
    6: "Table 6: fusion of several networks",
}


@dataclass(frozen=True)
class Published:
    """A row of Tables 3 to 5.  test_scales: Q.  method: as in evaluate.json.  Errors in %."""

    configuration: str
    train_scale: Scale
    test_scales: tuple[int, ...]
    method: str
    top1_error: float
    top5_error: float


@dataclass(frozen=True)
class PublishedFusion:
    """A row of Table 6.  members: configuration and S of every network.  Errors in %."""

    members: tuple[tuple[str, Scale], ...]
    method: str
    top1_error: float
    top5_error: float


def _dense(*rows: tuple[str, Scale, tuple[int, ...], float, float]) -> tuple[Published, ...]:
    return tuple(Published(name, s, q, "dense", top1, top5) for name, s, q, top1, top5 in rows)


_LOW, _HIGH, _ALL = (224, 256, 288), (352, 384, 416), (256, 384, 512)  # Q for S = 256, S = 384 and jitter (§4.2)

TABLE_3 = _dense(
    ("A", 256, (256,), 29.6, 10.4),
    ("A-LRN", 256, (256,), 29.7, 10.5),
    ("B", 256, (256,), 28.7, 9.9),
    ("C", 256, (256,), 28.1, 9.4),
    ("C", 384, (384,), 28.1, 9.3),
    ("C", JITTER, (384,), 27.3, 8.8),
    ("D", 256, (256,), 27.0, 8.8),
    ("D", 384, (384,), 26.8, 8.7),
    ("D", JITTER, (384,), 25.6, 8.1),
    ("E", 256, (256,), 27.3, 9.0),
    ("E", 384, (384,), 26.9, 8.7),
    ("E", JITTER, (384,), 25.5, 8.0),
)
TABLE_4 = _dense(
    ("B", 256, _LOW, 28.2, 9.6),
    ("C", 256, _LOW, 27.7, 9.2),
    ("C", 384, _HIGH, 27.8, 9.2),
    ("C", JITTER, _ALL, 26.3, 8.2),
    ("D", 256, _LOW, 26.6, 8.6),
    ("D", 384, _HIGH, 26.5, 8.6),
    ("D", JITTER, _ALL, 24.8, 7.5),
    ("E", 256, _LOW, 26.9, 8.7),
    ("E", 384, _HIGH, 26.7, 8.6),
    ("E", JITTER, _ALL, 24.8, 7.5),
)
TABLE_5 = (
    Published("D", JITTER, _ALL, "dense", 24.8, 7.5),
    Published("D", JITTER, _ALL, "multi_crop", 24.6, 7.5),
    Published("D", JITTER, _ALL, "multi_crop_and_dense", 24.4, 7.2),
    Published("E", JITTER, _ALL, "dense", 24.8, 7.5),
    Published("E", JITTER, _ALL, "multi_crop", 24.6, 7.4),
    Published("E", JITTER, _ALL, "multi_crop_and_dense", 24.4, 7.1),
)
_SUBMISSION: tuple[tuple[str, Scale], ...] = (
    ("D", 256), ("D", 384), ("D", JITTER), ("C", 256), ("C", 384), ("E", 256), ("E", 384),
)  # fmt: skip
_BEST: tuple[tuple[str, Scale], ...] = (("D", JITTER), ("E", JITTER))
TABLE_6 = (
    PublishedFusion(_SUBMISSION, "dense", 24.7, 7.5),
    PublishedFusion(_BEST, "dense", 24.0, 7.1),
    PublishedFusion(_BEST, "multi_crop", 23.9, 7.2),
    PublishedFusion(_BEST, "multi_crop_and_dense", 23.7, 6.8),
)
TABLES: dict[int, tuple[Published, ...]] = {3: TABLE_3, 4: TABLE_4, 5: TABLE_5}


def is_of(dataset: str, num_images: int) -> bool:
    """Whether these are the images of the paper's numbers.  dataset: shard.source."""
    return dataset in SOURCES and num_images == NUM_IMAGES


def scale_of(recorded: int | list[int] | None) -> Scale | None:
    """S as JSON has it: of the parameters of a training, or of an evaluation."""
    return (recorded[0], recorded[1]) if isinstance(recorded, list) else recorded


def shown_scale(scale: Scale | None) -> str:
    """256, or [256;512] as in the paper; empty if it is not known."""
    return "" if scale is None else f"[{scale[0]};{scale[1]}]" if isinstance(scale, tuple) else str(scale)
