"""Stage 3 of 4: a trained network and shards → the paper's evaluation, predictions for every image, plots.

A killed evaluation goes on where it was.  Several GPUs of one machine: python -m components.launch 8
components.evaluate …  The results are the same.
Compare two evaluations:  python -m components.evaluate compare PREDICTIONS PREDICTIONS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import program
from components.weights import origin

if TYPE_CHECKING:
    from components.stage import Stage
    from runtime.distributed import Group
    from runtime.shards.shardset import ShardSet
    from vgg.network.trained import Trained
    from vgg.params.evaluate import EvaluateParams


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("evaluate", __doc__)
    flags.add_argument("--shards", required=True, metavar="DIR", help="in: the shard stage's output")
    flags.add_argument("--checkpoint", required=True, metavar="DIR", help="in: the train stage's output")
    flags.add_argument("--predictions", required=True, metavar="DIR", help="out: predictions.npy, confusion, mistakes")
    flags.add_argument(
        "--confusion", required=True, metavar="FILE", help="out: images by true and predicted class, CSV"
    )
    flags.add_argument("--report", required=True, metavar="FILE", help="out: the evaluation on one page, HTML")
    flags.add_argument("--metrics", required=True, metavar="FILE", help="out: errors of every mode, JSON; written last")
    program.add_dvc_metrics(flags)
    program.add_executor_input(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        from components.evaluate import compare

        compare.main(arguments[1:])
        return
    args = parser().parse_args(arguments)
    from components.stage import Stage
    from runtime.distributed import joined
    from vgg.evaluation.evaluate import evaluate
    from vgg.params.evaluate import EvaluateParams

    stage = Stage("evaluate", args, EvaluateParams)
    shards = stage.open_shards()
    with joined() as group:
        trained = open_trained(stage, group)
        shards.verify(group.local_rank, group.local_world_size)
        if group.is_first:
            evaluate_and_write(stage, shards, trained, group)
        else:
            program.log.setLevel("WARNING")  # only rank 0 logs
            evaluate(stage.params, trained, shards, group, lambda *_: None)


def open_trained(stage: Stage[EvaluateParams], group: Group) -> Trained:
    """The trained network.  If it is in a store, one rank of every node downloads it before the others open it."""
    from runtime.store.place import downloaded
    from vgg.network.trained import Trained

    if group.local_rank:
        group.barrier()
    trained = Trained.open(downloaded(stage.args.checkpoint), stage.params.weights)
    origin.expect_classifier(trained.manifest, stage.args.checkpoint)
    stage.expect("checkpoint", stage.args.checkpoint, trained.digest)
    if not group.local_rank:
        group.barrier()
    return trained


def training(trained: Trained) -> dict[str, Any]:
    """What was trained, as far as the paper's tables tell networks apart."""
    network, run = trained.manifest["network"], trained.manifest["run"]
    names = ("configuration", "batch_norm", "input_size")
    return {
        **{name: network[name] for name in names},
        "train_scale": run.get("train", {}).get("train_scale"),
        "source": run.get("source", "trained"),
    }


def evaluate_and_write(stage: Stage[EvaluateParams], shards: ShardSet, trained: Trained, group: Group) -> None:
    """Rank 0: evaluate together with the other ranks, write and track the results."""
    from components.evaluate import confusion, page, partners, report
    from components.evaluate.subject import Subject
    from components.evaluate.table import markdown, table
    from components.progress import Progress
    from components.tracking import names
    from runtime import manifest
    from runtime.store import storage
    from runtime.store.place import output_at
    from vgg.evaluation.evaluate import evaluate
    from vgg.evaluation.parts import Parts

    args = stage.args
    fused, networks = partners.opened(stage, shards, trained.weights_sha256)
    location = stage.location(args.predictions)
    output = output_at(location)
    train = origin.parameters(trained.manifest)
    parts = Parts(
        manifest.sibling(output.directory, ".parts"), manifest.digest_of([stage.identity(), str(group.device)])
    )
    with output.writing(), stage.tracked(location, {"train": train}) as tracker:
        stage.track_shards(tracker, shards, "val", "eval")
        with Progress("evaluate") as bar:
            evaluation = evaluate(stage.params, trained, shards, group, bar, parts, fused)
        assert evaluation  # of the first rank
        metrics = {
            **evaluation.metrics,
            "weights_sha256": trained.weights_sha256,
            "data_digest": shards.digest,
            "classes_sha256": shards.classes_sha256,
            "dataset": shards.manifest["dataset"],
            "training": training(trained),
        }
        if fused:
            metrics["fused"] = [partners.network(metrics, evaluation.network_mode), *networks]
        inputs = {**stage.inputs, "weights_sha256": trained.weights_sha256}
        predictions = report.write(output.directory, shards, evaluation, metrics, stage.params.model_dump(), inputs)
        tracker.tags({"vgg.weights_sha256": trained.weights_sha256})
        stage.made(tracker, "predictions", location, predictions)
        output.upload()
        parts.delete()
        headline = {name: metrics[name] for name in ("top1_error", "top5_error", "loss")}
        tracker.metrics(names.results(headline))
        modes = {f"{mode}/{name}": r[name] for mode, r in metrics["modes"].items() for name in headline}
        tracker.metrics(names.results(modes), "child")
        tracker.name(names.title(shards.manifest["dataset"], train, metrics["top1_error"]))
        tracker.note(markdown(metrics, shards.manifest["dataset"]))
        for name in report.REPORT_FILES:
            tracker.artifact(output.directory / name, "eval", to="both" if name == "confusion.png" else "child")
        table_of_classes = confusion.table(shards, evaluation)
        earlier = stage.record_of("train", "checkpoint", trained.digest)
        html = page.page(Subject(shards, trained, evaluation, metrics, stage.record, earlier))
        manifest.write_atomically(Path(args.confusion), lambda file: file.write(table_of_classes))
        manifest.write_atomically(Path(args.report), lambda file: file.write(html))
        tracker.artifact(Path(args.report), "eval", to="both")
        stage.write_dvc_metrics(metrics, "top1_error", "top5_error")
        stage.finish(
            metrics,
            {"predictions": storage.address(location, predictions)},
            {
                "confusion": (args.confusion, confusion.for_kubeflow(shards, evaluation)),
                "report": (args.report, {}),
            },
        )
    program.log.info("%s", table(metrics))


if __name__ == "__main__":
    program.run(main)
