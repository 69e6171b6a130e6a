"""python -m components.register rollback: make the version with the alias `previous` the champion again.

The version that was the champion gets the tag mlflow.vgg.rolled_back (who, when, from, to), and the gate refuses its
weights from then on: `dvc repro` does not promote them again; --replace-champion of components.register does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from components import program


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.register rollback", __doc__)
    flags.add_argument(
        "--model-name", metavar="NAME", help="registered model; by default register.model_name of --params"
    )
    flags.add_argument("--params", default="params.yaml", help="file with the model's name (default: params.yaml)")
    return flags


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    from components.register import promotion, registry
    from vgg.params import load
    from vgg.params.register import RegisterParams

    name = args.model_name or load(args.params, "register", RegisterParams).model_name
    with registry.open_registry(name) as models:
        before, now = promotion.rollback(models)
    program.log.info(
        "%s version %s is champion again, instead of version %s, which has the tag %s. The gate refuses the weights of "
        "that version; components.register --replace-champion would promote them again.",
        name, now, before, registry.ROLLED_BACK,
    )  # fmt: skip
