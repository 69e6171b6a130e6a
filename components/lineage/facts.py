"""What is known about a link, picked out of its manifest, its metrics file and the records of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.lineage.links import BOXES, DATA, EVALUATION, LOCALISATIONS, LOCALISER, SOURCE, TRAINING, Link
from components.lineage.places import NETWORKS
from components.lineage.server import Made
from components.stage import RECORD_SUFFIX
from components.weights.origin import in_words
from vgg.params.localise import OVERRIDDEN
from vgg.params.shard import EMBEDDED


def metrics(project: Path, stage: str) -> dict[str, Any]:
    """What a stage has written at its end, with its record as "provenance"; {} if there is nothing."""
    path = project / "metrics" / f"{stage}.json"
    found = _json(path)
    return {**found, "provenance": _json(path.with_suffix(RECORD_SUFFIX))} if found else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def params(kind: str, own: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a link's own manifest."""
    keys = {
        EVALUATION: ("evaluate",), TRAINING: ("run", "train"), DATA: ("parameters",), LOCALISATIONS: ("localise",),
        LOCALISER: (), BOXES: ("parameters",),
    }  # fmt: skip
    if kind == LOCALISER and own:  # only what it was trained with
        trained = own["run"]["train"]
        return {**own["run"]["localise"], **{name: trained[name] for name in OVERRIDDEN}}
    for key in keys[kind]:
        own = own.get(key, {})
    return own


def imported(own: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The record of an import, from the checkpoint's manifest or what a version says; {} of a training."""
    return dict(own.get("run", {}).get("imported") or known.get("imported") or {})


def weights(link: Link) -> str:
    """sha256 of the last weights of a network, by a copy of it; '' without one."""
    return next((place.weights.get(place.manifest["last"], "") for place in link.places if place.weights), "")


def results(kind: str, own: dict[str, Any], metrics: dict[str, Any], known: dict[str, Any]) -> dict[str, str]:
    """Results for people."""
    found: dict[str, str] = {}
    if kind == EVALUATION and (result := own.get("metrics") or metrics):
        found["result"] = (
            f"top-1 error {100 * result['top1_error']:.2f} %, top-5 {100 * result['top5_error']:.2f} %, "
            f"{result['num_images']:,} images, {result['headline']}"
        )
    if kind == LOCALISATIONS and (result := own.get("metrics") or metrics):
        found["result"] = (
            f"localisation error {100 * result['top5_localisation_error']:.2f} % top-5, "
            f"{100 * result['class_given_error']:.2f} % with the class given, {result['num_images']:,} images"
        )
    if kind in NETWORKS:
        weights = known.get("weights_sha256") or metrics.get("weights_sha256")
        found |= {"weights": str(weights)} if weights else {}
        if record := imported(own, known):
            found["origin"] = f"{in_words(record)}, not trained here"
            found |= {"notes": " ".join(record["notes"])} if record["notes"] else {}
        else:
            found |= {"steps": own["last"].removeprefix("step-").lstrip("0")} if own else {}
    if kind == LOCALISER and metrics:
        found["result"] = (
            f"IoU below 0.5 of {100 * metrics['class_given_error']:.2f} %, the class given, "
            f"{metrics['num_images']:,} images"
        )
    if kind == BOXES and own:
        counts = (f"{part['num_own_boxes']:,} of {part['num_with_box']:,} {n}" for n, part in own["splits"].items())
        found["boxes"] = f"{' + '.join(counts)} images"
    if kind == DATA and own:
        images = " + ".join(f"{split['num_images']:,} {name}" for name, split in own["splits"].items())
        files = own["files"]
        found["images"] = f"{images}, {len(own['classes'])} classes, {sum(file['size'] for file in files):,} bytes"
    return found


def source(data: Link, own: dict[str, Any], known: dict[str, Any], runs: list[Made]) -> Link:
    """The source of shards: archives, a folder of images, or scikit-learn for embedded data."""
    kind = str(data.params.get("source", "unknown"))
    link = Link(SOURCE, own.get("images_sha256") or known.get("images_sha256") or "", kind)
    link.facts = {"images": link.digest} if link.digest else {}
    for archive in (own.get("source") or known.get("source") or {}).get("archives", []):
        link.facts[archive["name"]] = f"{archive['size']:,} bytes, md5 {archive['md5'] or 'not published'}"
    inputs = [run.record.get("inputs", {}) for run in runs]
    if kind in EMBEDDED:
        link.where.append("scikit-learn")
    elif images := next(
        (found["images"] for found in (*inputs, data.record.get("inputs", {})) if "images" in found), ""
    ):
        link.where.append(images)
    return link
