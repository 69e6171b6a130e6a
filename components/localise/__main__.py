"""Optional stage: shards, box annotations and a trained network → a localiser, and the boxes of the validation images.

Trains like the train stage: it continues from the newest checkpoint, and several GPUs of one machine take
python -m components.launch 8 components.localise …
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import program

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from components.stage import Stage
    from runtime.distributed import Group
    from runtime.shards.shardset import ShardSet
    from vgg.localisation.boxset import BoxSet
    from vgg.network.trained import Trained
    from vgg.params.localise import LocaliseParams


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("localise", __doc__)
    flags.add_argument("--images", required=True, metavar="DIR", help="in: folder with the annotations, as for shard")
    flags.add_argument("--shards", required=True, metavar="DIR", help="in: the shard stage's output")
    flags.add_argument("--checkpoint", required=True, metavar="DIR", help="in: the train stage's output")
    flags.add_argument("--boxes", required=True, metavar="DIR", help="out: the annotated boxes")
    flags.add_argument(
        "--localiser", required=True, metavar="DIR", help="out: checkpoints; manifest.json when finished"
    )
    flags.add_argument(
        "--localisations", required=True, metavar="DIR", help="out: boxes of the validation images, also as the devkit"
    )
    flags.add_argument("--curves", required=True, metavar="FILE", help="out: loss and error of every epoch, CSV")
    flags.add_argument("--report", required=True, metavar="FILE", help="out: the localisation on one page, HTML")
    flags.add_argument("--metrics", required=True, metavar="FILE", help="out: errors of both protocols; written last")
    program.add_dvc_metrics(flags)
    program.add_executor_input(flags)
    flags.add_argument(
        "--accept-code-change", action="store_true", help="continue an unfinished run although its code has changed"
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from components.stage import Stage
    from components.train.outputs import download_checkpoints, write_curves
    from components.train.reporter import Reporter, reporting
    from components.weights import origin
    from runtime import environment
    from runtime.ranks import nodes
    from runtime.ranks.watched import Heartbeat
    from runtime.stopping import StopSignal
    from runtime.store import storage
    from runtime.store.place import downloaded, output_at
    from vgg.params.localise import LocaliseParams

    stage = Stage("localise", args, LocaliseParams)
    heartbeat = Heartbeat()
    stop = StopSignal(heartbeat.beat)
    from runtime.distributed import joined  # torch, seconds in which a stop is noted already
    from vgg.localisation.localise import expect_suitable
    from vgg.localisation.objective import Localisation
    from vgg.network.trained import Trained
    from vgg.training.loop import train
    from vgg.training.task import Task

    shards = stage.open_shards()
    blacklisted = blacklist_of(stage, shards)
    classifier = Trained.open(downloaded(args.checkpoint))
    origin.expect_classifier(classifier.manifest, args.checkpoint)
    stage.expect("checkpoint", args.checkpoint, classifier.digest)
    partners = [Trained.open(downloaded(address)) for address in stage.params.fuse]
    for number, partner in enumerate(partners, 1):
        stage.inputs[f"fused_{number}"] = partner.digest
    expect_suitable(stage.params, classifier, partners, shards)
    with joined(environment.HANG_SECONDS.get() + 60) as group:
        boxes, boxes_at = open_boxes(stage, shards, group)
        objective = Localisation(stage.params, {name: boxes.split(name) for name in ("train", "val")}, boxes.digest)
        posteriors = classes_of(stage, shards)
        location = stage.location(args.localiser)
        output = output_at(location)
        if group.device.type == "cuda":
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(storage.cache_folder() / "compiled"))
        if not storage.is_remote(location):
            nodes.expect_shared(output.directory, group)
        shards.verify(group.local_rank, group.local_world_size, lambda *_: stop.raise_if_received())
        record = None if origin.imported(classifier.manifest) else classifier.manifest["run"]["train"]
        task = Task(
            params=stage.params.of_training(classifier.manifest["network"], record), shards=shards,
            directory=output.directory, code=stage.code, initial=classifier, objective=objective,
            accept_code_change=args.accept_code_change,
        )  # fmt: skip
        with (
            heartbeat.saving_stacks(output.directory),
            output.writing() if group.is_first else contextlib.nullcontext(),
        ):
            with reporting(stage, task, location, heartbeat, output, group, "localiser") as reporter:
                download_checkpoints(output, group)
                finished = train(task, group, reporter, stop)
                if finished and isinstance(reporter, Reporter):
                    output.upload()
                    write_curves(args.curves, finished)
                    reporter.finished(finished)
                group.barrier()
                localiser = finished or Trained.open(output.directory)
                rows = find_boxes(stage, shards, classifier, [localiser, *partners], posteriors, group)
                if rows is not None and isinstance(reporter, Reporter):
                    stage.made(reporter.tracker, "boxes", boxes_at, boxes.digest)
                    write_outputs(stage, reporter, shards, boxes, [classifier, localiser], rows, blacklisted)


def open_boxes(stage: Stage[LocaliseParams], shards: ShardSet, group: Group) -> tuple[BoxSet, str]:
    """The annotated boxes and where they are; made by the first rank, anew, as the annotations may have changed."""
    from components.progress import Progress
    from runtime.store.place import output_at
    from vgg.localisation import boxset

    params, recorded = stage.params, shards.manifest["parameters"]
    location = stage.location(stage.args.boxes)
    output = output_at(location)
    if group.is_first:
        with output.writing(), Progress("boxes") as bar:
            boxset.write(
                shards.manifest["dataset"], Path(stage.args.images), shards, output.directory,
                pixel_origin=params.pixel_origin, on_box_mismatch=params.on_box_mismatch,
                check_md5=recorded["check_md5"], report=bar,
            )  # fmt: skip
            output.upload()
    group.barrier()
    found = boxset.BoxSet.open(output.download(), shards)
    stage.inputs["boxes"] = found.digest
    return found, location


def classes_of(stage: Stage[LocaliseParams], shards: ShardSet) -> NDArray[np.float16] | None:
    """The mean of the posteriors of localise.classify, to choose the classes by; None for the network's own."""
    import numpy as np

    from components.evaluate.partners import predictions_at

    keys, found = np.asarray(shards.split("val").rows["key"]), []
    for number, address in enumerate(stage.params.classify, 1):
        partner, _, digest = predictions_at(address)
        stage.inputs[f"classify_{number}"] = digest
        found.append(partner.joined(keys, shards.classes_sha256).posteriors.astype(np.float32))
    return np.mean(found, 0).astype(np.float16) if found else None


def blacklist_of(stage: Stage[LocaliseParams], shards: ShardSet) -> NDArray[np.bool_] | None:
    """The validation images of localise.blacklist, bool (n,); None without one."""
    import hashlib

    from runtime.store.place import content_of
    from vgg.localisation.devkit import read_blacklist

    if (address := stage.params.blacklist) is None:
        return None
    data, split = content_of(address, "localise.blacklist"), shards.split("val")
    stage.inputs["blacklist"] = hashlib.sha256(data).hexdigest()
    return read_blacklist(data, address, [split.key(number) for number in range(len(split))])


def find_boxes(
    stage: Stage[LocaliseParams],
    shards: ShardSet,
    classifier: Trained,
    localisers: Sequence[Trained],
    posteriors: NDArray[np.float16] | None,
    group: Group,
) -> NDArray[np.void] | None:
    from components.progress import Progress
    from vgg.localisation.localise import localise

    with Progress("localise") as bar:
        return localise(stage.params, classifier, localisers, shards, group, bar, posteriors)


def write_outputs(
    stage: Stage[LocaliseParams],
    reporter: Any,
    shards: ShardSet,
    boxes: BoxSet,
    networks: Sequence[Trained],
    rows: NDArray[np.void],
    blacklisted: NDArray[np.bool_] | None,
) -> None:
    """Write and track the results, the metrics last.  networks: the classifier, the localiser."""
    from components.localise import report
    from components.localise.page import Subject, page
    from components.localise.table import errors, markdown, table
    from components.tracking import names
    from runtime import manifest
    from runtime.store import storage
    from runtime.store.place import output_at
    from vgg.localisation.results import Results, floors

    args, tracker, (classifier, localiser) = stage.args, reporter.tracker, networks
    train, true = (boxes.split(name) for name in ("train", "val"))
    results = Results.of(rows, true, shards, blacklisted)
    metrics = {
        **results.metrics(len(shards.wnids)),
        "floors": floors(train, true, shards, results.counted),
        "weights_sha256": localiser.weights_sha256,
        "classifier_sha256": localiser.manifest["run"]["initial"],
        "data_digest": shards.digest,
        "boxes_digest": boxes.digest,
        "dataset": shards.manifest["dataset"],
    }
    location = stage.location(args.localisations)
    output = output_at(location)
    with output.writing():
        inputs = {**stage.inputs, "localiser": localiser.digest, "weights_sha256": localiser.weights_sha256}
        digest = report.write(output.directory, shards, results, metrics, stage.params.model_dump(), inputs)
        output.upload()
    stage.made(tracker, "localisations", location, digest)
    headline = {name: value for name, value in metrics.items() if name.endswith("_error") or name == "mean_iou"}
    tracker.metrics(names.results(headline))
    tracker.metrics(names.results(errors(metrics)), "child")
    tracker.note(markdown(metrics), "child")
    params = stage.params.model_dump()
    html = page(Subject(shards, true, results, classifier, localiser, metrics, params, stage.record))
    manifest.write_atomically(Path(args.report), lambda file: file.write(html))
    tracker.artifact(Path(args.report), "localise", to="both")
    addresses = {
        "localiser": storage.address(reporter.location, localiser.digest),
        "localisations": storage.address(location, digest),
    }
    stage.write_dvc_metrics(metrics, "top5_localisation_error", "class_given_error", "centre_crop_error", "mean_iou")
    stage.finish(metrics, addresses, {"curves": (args.curves, {}), "report": (args.report, {})})
    program.log.info("%s", table(metrics))


if __name__ == "__main__":
    program.run(main)
