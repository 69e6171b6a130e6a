"""What a training will do and need, before any data is read or a GPU asked for: python -m components.train.plan"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components import program


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("train", __doc__, module="components.train.plan")
    flags.add_argument("--shards", metavar="DIR", help="finished shards; else shard.source says how many images")
    flags.add_argument(
        "--num-images", type=_above_0(int), metavar="N", help="training images, if neither --shards nor source says"
    )
    flags.add_argument("--num-classes", type=_above_0(int), metavar="N", help="classes, if neither of them says")
    flags.add_argument("--ranks", type=_above_0(int), default=1, metavar="N", help="processes, one a GPU (default: 1)")
    flags.add_argument(
        "--images-per-second", type=_above_0(float), metavar="R", help="of all ranks together, for the hours it takes"
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan.  Raises WrongParameters for wrong parameters, and if nothing says how many images there are."""
    args = parser().parse_args(argv)
    from vgg.params import load
    from vgg.params.train import TrainParams
    from vgg.training import plan

    params = load(args.params, "train", TrainParams)
    about = manifest_of(args.shards) if args.shards else None
    data = plan.data(args.params, about, args.num_images, args.num_classes)
    print("\n".join(plan.lines(params, data, args.ranks, args.images_per_second)))


def manifest_of(shards: str) -> dict[str, Any] | None:
    """The manifest of a set of shards, if it is finished.  Nothing else of the set is read."""
    from runtime import manifest
    from runtime.shardset import SCHEMA
    from runtime.store import storage

    place = storage.resolve(shards)
    if storage.is_remote(place):
        from runtime.store.s3 import Prefix

        raw = Prefix(place).get(manifest.NAME)
    else:
        path = Path(place) / manifest.NAME
        raw = path.read_bytes() if path.is_file() else None
    return None if raw is None else manifest.parse(raw, SCHEMA, f"{place}/{manifest.NAME}")


def _above_0(kind: Callable[[str], float]) -> Callable[[str], float]:
    def value(text: str) -> float:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    value.__name__ = kind.__name__  # what argparse calls it in messages
    return value


if __name__ == "__main__":
    program.run(main)
