"""The plan of a training, told before anything is read, written or computed: components.train --dry-run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgg.errors import WrongParameters

FLAGS = ("--num-images", "--num-classes", "--ranks", "--images-per-second")


class DryRun(argparse.Action):
    """--dry-run: a plan reads and writes nothing, so of the other flags only --params stays required."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            action.required = action.required and action.dest == "params"


def add_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("dry run")
    group.add_argument("--dry-run", action=DryRun, help="print what this training will do and need, and do nothing")
    group.add_argument(
        "--num-images", type=_above_0(int), metavar="N", help="training images, if neither --shards nor source tells"
    )
    group.add_argument("--num-classes", type=_above_0(int), metavar="N", help="classes, if neither of them tells")
    group.add_argument("--ranks", type=_above_0(int), metavar="N", help="processes, one a GPU (default: 1)")
    group.add_argument(
        "--images-per-second", type=_above_0(float), metavar="R", help="of all ranks together, for the hours it takes"
    )


def requested(args: argparse.Namespace) -> bool:
    """Whether only the plan is wanted.  Raises WrongParameters for its flags without --dry-run."""
    given = [flag for flag in FLAGS if getattr(args, flag[2:].replace("-", "_")) is not None]
    if given and not args.dry_run:
        raise WrongParameters(f"{', '.join(given)}: only with --dry-run")
    return bool(args.dry_run)


def show(args: argparse.Namespace) -> None:
    """Print the plan.  Raises WrongParameters for wrong parameters, and if nothing tells how many images there are."""
    from vgg.params import load
    from vgg.params.train import TrainParams

    params = load(args.params, "train", TrainParams)
    # by name: a plan changes no result, so training must not depend on its code (components.closure)
    plan = importlib.import_module("vgg.plan")
    about = manifest_of(args.shards) if args.shards else None
    data = plan.data(args.params, about, args.num_images, args.num_classes)
    print("\n".join(plan.lines(params, data, args.ranks or 1, args.images_per_second)))


def manifest_of(shards: str) -> dict[str, Any] | None:
    """The manifest of a set of shards, if it is finished.  Nothing else of the set is read."""
    from components import storage
    from vgg import manifest
    from vgg.index import SCHEMA

    place = storage.resolve(shards)
    if storage.is_remote(place):
        from components.s3 import Prefix

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
