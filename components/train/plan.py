"""Print what a training run will do and need, without data or a GPU: python -m components.train.plan"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from components import program


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("train", __doc__, module="components.train.plan")
    flags.add_argument("--shards", metavar="DIR", help="finished shards; else shard.source gives the number of images")
    flags.add_argument(
        "--num-images", type=_positive(int), metavar="N", help="training images, if neither of them gives it"
    )
    flags.add_argument("--num-classes", type=_positive(int), metavar="N", help="classes, likewise")
    flags.add_argument("--ranks", type=_positive(int), default=1, metavar="N", help="ranks, one per GPU (default 1)")
    flags.add_argument(
        "--images-per-second", type=_positive(float), metavar="R", help="of all ranks together, to estimate the hours"
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan.  Raises WrongParameters for wrong parameters or an unknown number of images."""
    args = parser().parse_args(argv)
    from vgg.params import load
    from vgg.params.train import TrainParams
    from vgg.training import plan
    from vgg.training.reporting import without_effect

    params = load(args.params, "train", TrainParams)
    manifest = manifest_of(args.shards) if args.shards else None
    data = plan.data(args.params, manifest, args.num_images, args.num_classes)
    print("\n".join(plan.lines(params, data, args.ranks, args.images_per_second)))
    for line in without_effect(params, "cuda", args.ranks, data.num_images):
        program.log.warning("train.%s", line)


def manifest_of(shards: str) -> dict[str, Any]:
    """The manifest of a shard set.  Reads nothing else of the set.  Raises WrongParameters if it is not finished."""
    from runtime import manifest
    from runtime.errors import WrongParameters
    from runtime.shards.shardset import SCHEMA
    from runtime.store import storage
    from runtime.store.place import manifest_at

    location = storage.resolve(shards)
    raw = manifest_at(location)
    if raw is None:
        raise WrongParameters(
            f"--shards: no finished shards at {location}. Run the shard stage first, or leave --shards out: then "
            "shard.source gives the number of images."
        )
    return manifest.parse(raw, SCHEMA, f"{location}/{manifest.NAME}")


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def value(text: str) -> float:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"must be greater than 0, not {text}")
        return number

    value.__name__ = kind.__name__  # what argparse calls it in messages
    return value


if __name__ == "__main__":
    program.run(main)
