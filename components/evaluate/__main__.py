"""Stage 3 of 4: a trained network and shards → the paper's evaluation, predictions of every image, plots."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from components import program


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
    from components import closure, mirror, progress, provenance, storage, tracking
    from components.evaluate import confusion, page, report
    from components.evaluate.table import table
    from vgg import manifest
    from vgg.checkpoint import Trained
    from vgg.distributed import joined
    from vgg.evaluate import evaluate

    shards, trained = (
        storage.open_shards(args.shards),
        Trained.open(mirror.fetched(args.checkpoint), params.weights),
    )
    storage.expect(args.shards, shards.digest)
    storage.expect(args.checkpoint, trained.digest)
    shards.verify()
    inputs = {"shards": shards.digest, "checkpoint": trained.digest}
    identity = {"evaluate": params.model_dump(), "code": closure.fingerprints("evaluate"), **inputs}
    place = storage.resolve(args.predictions, identity)
    kept = mirror.at(place)
    with (
        joined() as group,
        kept.writing(),
        tracking.Tracker("evaluate", manifest.digest_of(identity), provenance.lineage(args.params)) as tracker,
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
