"""Stage 3 of 4: a trained network and shards → the paper's evaluation, predictions of every image, plots.

Several GPUs of one machine: python -m components.launch 8 components.evaluate …  The results are those of one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components import program

if TYPE_CHECKING:
    from vgg.checkpoint import Trained
    from vgg.distributed import Group
    from vgg.index import ShardSet
    from vgg.params.evaluate import EvaluateParams


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("evaluate", __doc__)
    flags.add_argument("--shards", required=True, metavar="DIR", help="in: the shard stage's output")
    flags.add_argument("--checkpoint", required=True, metavar="DIR", help="in: the train stage's output")
    flags.add_argument("--predictions", required=True, metavar="DIR", help="out: predictions.npy, confusion, mistakes")
    flags.add_argument(
        "--confusion", required=True, metavar="FILE", help="out: every image's class and the guess, CSV, to be plotted"
    )
    flags.add_argument("--report", required=True, metavar="FILE", help="out: all of it on one page, HTML")
    flags.add_argument("--metrics", required=True, metavar="FILE", help="out: errors of every mode, JSON; written last")
    program.add_executor_input(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from vgg.params import load
    from vgg.params.evaluate import EvaluateParams

    params = load(args.params, "evaluate", EvaluateParams)
    from components import storage
    from vgg.distributed import joined
    from vgg.evaluate import evaluate

    shards = storage.open_shards(args.shards)
    storage.expect(args.shards, shards.digest)
    with joined() as group:
        trained = opened(args.checkpoint, params.weights, group)
        shards.verify(group.local_rank, group.local_world_size)
        if group.is_first:
            write(args, params, shards, trained, group)
        else:
            program.log.setLevel("WARNING")  # what all know is said once
            evaluate(params, trained, shards, group, lambda *_: None)


def opened(checkpoint: str, weights: str, group: Group) -> Trained:
    """The trained network; on every node one rank brings it, if it is in a store, before the others look for it."""
    from components import mirror, storage
    from vgg.checkpoint import Trained

    if group.local_rank:
        group.barrier()
    trained = Trained.open(mirror.fetched(checkpoint), weights)
    storage.expect(checkpoint, trained.digest)
    if not group.local_rank:
        group.barrier()
    return trained


def write(args: argparse.Namespace, params: EvaluateParams, shards: ShardSet, trained: Trained, group: Group) -> None:
    """Rank 0: evaluate together with the others; all that is written and tracked."""
    from components import closure, mirror, progress, provenance, storage, tracking
    from components.evaluate import confusion, page, report
    from components.evaluate.table import table
    from vgg import manifest
    from vgg.evaluate import evaluate

    inputs = {"shards": shards.digest, "checkpoint": trained.digest}
    identity = {"evaluate": params.model_dump(), "code": closure.fingerprints("evaluate"), **inputs}
    place = storage.resolve(args.predictions, identity)
    kept = mirror.at(place)
    with (
        kept.writing(),
        tracking.Tracker("evaluate", tracking.key(identity, place), provenance.lineage(args.params)) as tracker,
    ):
        tracker.params({"evaluate": params.model_dump(), "train": trained.manifest["run"]["train"]})
        tracker.tags(provenance.tags(provenance.record("evaluate", params.model_dump(), inputs)))
        profile = {"num_images": len(shards.split("val")), "num_classes": len(shards.wnids)}
        tracker.dataset(shards.manifest["dataset"], args.shards, shards.digest, "eval", profile)
        with progress.Progress("evaluate") as bar:
            evaluation = evaluate(params, trained, shards, group, bar)
        metrics = {
            **evaluation.metrics,
            "weights_sha256": trained.weights_sha256,
            "data_digest": shards.digest,
            "classes_sha256": shards.classes_sha256,
        }
        predictions = report.write(kept.directory, shards, evaluation, params.model_dump())
        kept.send()
        headline = {name: metrics[name] for name in ("top1_error", "top5_error", "loss")}
        tracker.metrics({f"eval/{name}": value for name, value in headline.items()})
        modes = {f"eval/{mode}/{name}": r[name] for mode, r in metrics["modes"].items() for name in headline}
        tracker.metrics(modes, "child")
        tracker.note(f"```\n{table(metrics)}\n```")
        for name in report.FOR_PEOPLE:
            tracker.artifact(kept.directory / name, "eval")
        table_of_guesses = confusion.table(shards, evaluation)
        manifest.write_atomically(Path(args.confusion), lambda file: file.write(table_of_guesses))
        html = page.page(metrics, kept.directory, shards)
        manifest.write_atomically(Path(args.report), lambda file: file.write(html))
        tracker.artifact(Path(args.report), "eval")
        manifest.write_json(Path(args.metrics), metrics)
    program.write_executor_output(
        args.executor_output,
        {"predictions": storage.address(place, predictions)},
        {
            "metrics": (args.metrics, program.numbers(metrics)),
            "confusion": (args.confusion, confusion.for_kubeflow(shards, evaluation)),
            "report": (args.report, {}),
        },
    )
    program.log.info("%s", table(metrics))


if __name__ == "__main__":
    program.run(main)
