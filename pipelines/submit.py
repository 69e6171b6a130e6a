"""Compile the pipeline, or submit it to Kubeflow Pipelines.

python -m pipelines.submit --compile build/vgg-imagenet.yaml
python -m pipelines.submit --host http://localhost:8888 --images /store/imagenet -S train.epochs=1
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from components.program import Parser, run
from vgg.errors import Refused, Unreachable, WrongParameters
from vgg.params import STAGES, load, section_model


def parser() -> argparse.ArgumentParser:
    flags = Parser("pipelines.submit", __doc__)
    flags.add_argument("--compile", metavar="FILE", help="write the package there and submit nothing")
    flags.add_argument("--host", metavar="URL", help="Kubeflow Pipelines' API")
    flags.add_argument("--params", default="params.yaml", metavar="FILE")
    flags.add_argument(
        "-S",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a parameter of this run",
    )
    flags.add_argument(
        "--images", default="", metavar="DIR", help="folder of the source, as the steps see it (digits: none)"
    )
    flags.add_argument("--initial", default="", metavar="DIR", help="finished checkpoint, for the inits that need one")
    flags.add_argument("--gpus", type=int, default=1, help="of the training step")
    flags.add_argument("--experiment", default="vgg-imagenet", help="Kubeflow experiment")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.compile:
        compile_package(Path(args.compile))
        print(args.compile)
    elif args.host:
        submit(args)
    else:
        raise WrongParameters("say --compile FILE or --host URL")


def compile_package(path: Path) -> None:
    """Write the pipeline's IR; the same bytes every time."""
    from kfp import compiler

    from pipelines.imagenet import vgg_imagenet

    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(vgg_imagenet, str(path))


def sections(path: str, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The four sections of a params file with overrides, checked.  Raises WrongParameters, naming every mistake."""
    for stage in STAGES:
        load(path, stage, section_model(stage))
    yaml = YAML(typ="safe", pure=True)
    document = yaml.load(Path(path))
    for override in overrides:
        name, equals, value = override.partition("=")
        *parents, key = name.split(".")
        place = document
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict) or key not in place:
            raise WrongParameters(f"-S {override}: no such parameter; write SECTION.KEY=VALUE (python -m vgg.params)")
        try:
            place[key] = yaml.load(value)
        except YAMLError as error:
            raise WrongParameters(f"-S {override}: not YAML: {error}") from None
    mistakes = []
    for stage in STAGES:
        try:
            load(json.dumps(document[stage], default=str), stage, section_model(stage))
        except WrongParameters as error:
            mistakes.append(str(error))
    if mistakes:
        raise WrongParameters("\n".join(mistakes))
    return {stage: document[stage] for stage in STAGES}


def submit(args: argparse.Namespace) -> None:
    """Start a run with the sections as its arguments, and say where it can be seen."""
    arguments = {
        **sections(args.params, args.overrides),
        "images": args.images,
        "initial": args.initial,
        "gpus": args.gpus,
    }
    from kfp import Client
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "vgg-imagenet.yaml"
        compile_package(package)
        try:
            started = Client(host=args.host).create_run_from_pipeline_package(
                str(package), arguments, experiment_name=args.experiment, enable_caching=True
            )
        except ApiException as error:
            raise Refused(f"{args.host}: {error.status} {error.reason}: {error.body}") from None
        except (HTTPError, OSError) as error:
            raise Unreachable(f"{args.host}: {error}. Is the port forwarded?") from None
    print(f"{args.host}/#/runs/details/{started.run_id}")


if __name__ == "__main__":
    run(main)
