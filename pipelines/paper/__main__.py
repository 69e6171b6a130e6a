"""The paper's tables 3 to 6 (arXiv 1409.1556) from finished evaluations, ours beside the paper's.

python -m pipelines.paper --table 4 --runs .                   of this project: its metrics or predictions
python -m pipelines.paper --table 4 --runs runs --markdown     of a folder with many evaluations
python -m pipelines.paper --plan --images-per-second 4000      the runs that the tables need, in order, with hours
python -m pipelines.paper --run --seeds 1,2,3                  does them, one after another; again: continues
python -m pipelines.paper --run --cluster --images /store/imagenet -- --host URL -C gpus=8     as Kubeflow runs

Errors are in %: of one network with its 95 % interval, of several seeds their mean and range.  Rows that were not run
are empty.  Of other images than ImageNet's the paper's numbers are not shown.  For --run see also runs/ (--folder).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.program import Parser, run
from runtime.errors import WrongParameters

if TYPE_CHECKING:
    from pipelines.paper.recipes import Run

log = logging.getLogger("vgg.paper")

IMAGENET = "imagenet-*.yaml"  # of recipes/, without --recipes


def parser() -> argparse.ArgumentParser:
    flags = Parser("pipelines.paper", __doc__)
    flags.add_argument(
        "submit", nargs="*", metavar="-- FLAG", help="with --cluster, after --: flags of pipelines.submit"
    )
    flags.add_argument(
        "--table",
        type=int,
        choices=(3, 4, 5, 6),
        metavar="3|4|5|6",
        help="which table; with --plan and --run: only its runs",
    )
    flags.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="evaluations: projects, metrics files, predictions, folders with them",
    )
    flags.add_argument(
        "--imagenet", action="store_true", help="a data set from a folder or parquet files is that of ILSVRC-2012"
    )
    flags.add_argument("--markdown", action="store_true", help="the table in Markdown")
    flags.add_argument("--json", action="store_true", help="table or plan as JSON")
    what = flags.add_argument_group("the runs")
    what.add_argument("--plan", action="store_true", help="print them; runs nothing")
    what.add_argument("--run", action="store_true", help="do them through DVC, each in a git worktree of --folder")
    what.add_argument(
        "--recipes", nargs="+", type=Path, metavar="FILE", help="their parameters, files or folders (those of ImageNet)"
    )
    what.add_argument(
        "--seeds", type=_seeds, default=[], metavar="N,N,…", help="every recipe with each of these train.seed"
    )
    what.add_argument("--folder", type=Path, default=Path("runs"), metavar="DIR", help="of the worktrees (runs)")
    what.add_argument(
        "--images", default="", metavar="DIR", help="what sharding reads (data/images; on a cluster none)"
    )
    what.add_argument("--cluster", action="store_true", help="with --run: as Kubeflow runs, results in VGG_STORE")
    what.add_argument(
        "--images-per-second",
        nargs="+",
        default=[],
        metavar="R",
        help="measured in training, for the hours: of net D, or NET=R of others;\nothers go by their FLOPs",
    )
    what.add_argument("--shards", metavar="DIR", help="finished shards, which give the number of images")
    what.add_argument(
        "--num-images", type=int, metavar="N", help="training images, if neither they nor shard.source do"
    )
    what.add_argument("--num-classes", type=int, metavar="N", help="classes, likewise")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.plan and args.run:
        raise WrongParameters("--plan or --run, not both")
    if (args.cluster and not args.run) or (args.submit and not args.cluster):
        raise WrongParameters("flags of pipelines.submit need --run --cluster: … --run --cluster -- --host URL")
    if args.plan:
        plan(args)
    elif args.run:
        study(args)
    elif args.table and args.runs:
        table(args)
    else:
        raise WrongParameters("write --table 3|4|5|6 --runs DIR…, or --plan, or --run (--help explains them)")


def table(args: argparse.Namespace) -> None:
    from pipelines.paper import found, show
    from pipelines.paper import table as tables

    evaluations = found.find(args.runs)
    wanted = [key for run in runs_of(args) for key in run.keys(args.table)] if args.recipes else []
    made = tables.make(args.table, evaluations, wanted, args.imagenet)
    if args.json:
        print(json.dumps(show.as_json(made), indent=2))
    else:
        print(show.markdown(made) if args.markdown else show.text(made))


def plan(args: argparse.Namespace) -> None:
    from components.train.plan import manifest_of
    from pipelines.paper import plan as plans

    rates = plans.rates(args.images_per_second)
    shards = manifest_of(args.shards) if args.shards else None
    made = plans.make(runs_of(args), rates, shards, args.num_images, args.num_classes)
    print(json.dumps(made, indent=2) if args.json else plans.text(made))


def study(args: argparse.Namespace) -> None:
    from pipelines.paper import cluster
    from pipelines.paper.study import Study
    from runtime import environment

    runs, project = runs_of(args), environment.project()
    if args.cluster:
        cluster.Study(args.folder, args.submit, args.images).run(runs)
    else:
        images = Path(args.images or "data/images").absolute()
        with Study.opened(project, args.folder.absolute(), images) as opened:
            opened.run(runs)
    log.info(
        "all %d runs are finished; for the tables: python -m pipelines.paper --table 4 --runs %s",
        len(runs),
        args.folder,
    )


def runs_of(args: argparse.Namespace) -> list[Run]:
    from pipelines.paper import recipes

    runs = recipes.read(args.recipes or [Path("recipes")], args.seeds, *([] if args.recipes else [IMAGENET]))
    if args.table and (args.plan or args.run):
        runs = recipes.needed(runs, args.table)
        if not runs:
            raise WrongParameters(f"no recipe fills a row of Table {args.table}: {_why_not(args.table)}")
    return runs


def _why_not(number: int) -> str:
    return {5: "evaluate.methods has no multi_crop"}.get(number, "see evaluate.methods and evaluate.test_scales")


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"write numbers with commas, 1,2,3, not {text!r}") from None


if __name__ == "__main__":
    run(main)
