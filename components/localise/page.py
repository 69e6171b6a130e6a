"""The localisation as one self-contained HTML page: for MLflow, Kubeflow, DVC, a browser, or a printer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from components.evaluate import drawings
from components.evaluate import page as evaluation
from components.evaluate.page import WORST_CLASSES, percent
from components.evaluate.subject import commit_of, data_of
from components.localise import pictures, published
from components.weights import origin
from runtime.shards.shardset import ShardSet
from runtime.wording import counted
from vgg.localisation.instances import Instances
from vgg.localisation.metric import class_counts, corloc
from vgg.localisation.results import Results
from vgg.network.trained import Trained

STYLE = evaluation.STYLE + pictures.STYLE
MODES = {
    "centre_crop": "one central crop",
    "best_window": "best single window",
    "mean": "mean of all windows",
    "merged": "merged",
    "whole_image": "the whole image",
    "mean_box": "the mean box of training",
}
TRAINED_LAYERS = {"first_last": "fc6 and fc8", "fc": "the fully connected layers", "all": "all layers"}


@dataclass(frozen=True)
class Subject:
    """What the page is about.  true: boxes of the validation images.  record: provenance of this stage."""

    shards: ShardSet
    true: Instances
    results: Results
    classifier: Trained
    localiser: Trained
    metrics: dict[str, Any]
    params: dict[str, Any]
    record: dict[str, Any]


def page(subject: Subject) -> bytes:
    metrics, shards = subject.metrics, subject.shards
    title = f"{percent(metrics['top5_localisation_error'])} top-5 localisation error"
    given, left_out = metrics["class_given"]["merged"], metrics["num_blacklisted"]
    images = "".join(
        f"<h3>{kind.title}</h3><p>{kind.text}</p>{pictures.tiles(shards, subject.true, subject.results, kind.numbers)}"
        for kind in pictures.kinds(subject.results)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>VGG: {title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{metrics["num_images"]:,} validation images of {len(shards.wnids):,} classes of {escape(metrics["dataset"])}\
{f", {left_out:,} of them blacklisted for localisation" if left_out else ""}. With the class given,
{percent(given["error"])} of the boxes are wrong (95 %: {_between(given["interval"])}):
their IoU with every instance is below 0.5.</p>
<h2>What was trained</h2>{_facts(subject)}
<h2>Results</h2>{_given(metrics)}{_guesses(metrics)}{_beside_the_paper(subject)}
{_curves(subject.localiser)}
<h2>Overlap</h2>{_overlap(subject)}
<h2>Classes</h2>{_classes(subject)}
<h2>Images</h2>{pictures.LEGEND}{images}
<h2>What to do next</h2><ul>{"".join(f"<li>{line}</li>" for line in _next(subject))}</ul>
</body></html>
""".encode()


def _facts(subject: Subject) -> str:
    params, network = subject.params, subject.classifier.manifest["network"]
    imported = origin.imported(subject.classifier.manifest)
    norm = " with batch normalisation" if network["batch_norm"] else ""
    one = "one for each class (PCR)" if params["regression"] == "per_class" else "one for all classes (SCR)"
    threshold = f"{params['match']}, t = {params['merge_threshold']:g}"
    known = {
        "network": f"VGG, configuration {network['configuration']}{norm}, {network['input_size']} pixels; boxes: {one}",
        "classifier": f"weights sha256 {subject.classifier.weights_sha256}"
        + (f", {origin.in_words(imported)}" if imported else "")
        + (f"; the five classes by {counted(len(params['classify']), 'evaluation')}" if params["classify"] else ""),
        "training": f"{TRAINED_LAYERS[params['trainable']]}, S = {params['train_scale']}, {params['epochs']} epochs, "
        f"batch {params['batch_size']}, rate {params['learning_rate']:g}, seed {params['seed']}; of several boxes "
        f"{'one drawn' if params['instances'] == 'drawn' else 'the largest'}; crops that show "
        f"at least {100 * params['min_visible']:g} % of it",
        "testing": f"Q = {', '.join(map(str, params['test_scales']))}; merged by {threshold}"
        + (f"; with the boxes of {counted(len(params['fuse']), 'other localiser')}" if params["fuse"] else ""),
        "trained on": data_of(subject.localiser.manifest["run"]["data"], subject.shards),
        "boxes": subject.metrics["boxes_digest"],
        "made by": commit_of(subject.record),
        "weights": f"sha256 {subject.localiser.weights_sha256}",
    }
    rows = "".join(f'<tr><td>{name}</td><td class="text">{escape(text)}</td></tr>' for name, text in known.items())
    return f"<table>{rows}</table>"


def _between(interval: list[float]) -> str:
    return f"{100 * interval[0]:.2f}&nbsp;–&nbsp;{percent(interval[1])}"


def _given(metrics: dict[str, Any]) -> str:
    """Of every kind of box, and of two that have learnt nothing."""
    rows = [
        (MODES[mode], percent(found["error"]), _between(found["interval"]), f"{found['mean_iou']:.3f}")
        for mode, found in metrics["class_given"].items()
    ]
    rows += [(f"{MODES[name]} (nothing learnt)", percent(error), "", "") for name, error in metrics["floors"].items()]
    table = evaluation.table(("box", "error", "95 %", "mean IoU"), rows)
    return f"<h3>The class given</h3>{table}"


def _guesses(metrics: dict[str, Any]) -> str:
    rows = [
        (
            MODES[mode], percent(found["top1_error"]), _between(found["top1_interval"]),
            percent(found["top5_error"]), _between(found["top5_interval"]),
        )
        for mode, found in metrics["localisation"].items()
    ]  # fmt: skip
    found = metrics["classification"]
    rows.append(
        (
            "classes alone, any box", percent(found["top1_error"]), _between(found["top1_interval"]),
            percent(found["top5_error"]), _between(found["top5_interval"]),
        )
    )  # fmt: skip
    images = metrics["localisation"]["merged"]["num_images"]
    note = f"Localisation: {images:,} images; classes: {found['num_images']:,}. Intervals: Wilson."
    table = evaluation.table(("box", "top-1 error", "95 %", "top-5 error", "95 %"), rows)
    return f'<h3>Five guesses: class and box</h3>{table}<p class="quiet">{note}</p>'


def _beside_the_paper(subject: Subject) -> str:
    found = list(published.rows(subject.metrics, subject.params, subject.classifier.manifest["network"]))
    if not found:
        return ""
    rows = [(row.what, percent(row.ours), _between(row.interval), f"{row.theirs}") for row in found]
    table = evaluation.table(("arXiv 1409.1556", "error here", "95 %", "paper, %"), rows)
    note = "The paper's five classes are those of its best classifiers together (§4.5): localise.classify."
    return f'<h3>Beside the paper</h3>{table}<p class="quiet">{note}</p>'


def _curves(localiser: Trained) -> str:
    """Learning curves, if more than one epoch is known."""
    history = localiser.step.state.get("history", [])
    if len(history) < 2:
        return ""
    losses = {name: [(row["epoch"], row[f"{name}_loss"]) for row in history] for name in ("train", "val")}
    errors = {name: [(row["epoch"], 100 * row[f"{name}_box_error"]) for row in history] for name in ("train", "val")}
    drawn = drawings.curves(losses, "epoch", "loss") + drawings.curves(errors, "epoch", "IoU below 0.5, %")
    note = "Of one crop with the class given: random ones in training, the central one in validation."
    return f'<h2>Learning curves</h2><div class="row">{drawn}</div><p class="quiet">{note}</p>'


def _overlap(subject: Subject) -> str:
    share, aspect = pictures.shares_and_aspects(subject.shards, subject.true)
    by_size = pictures.errors_by(subject.results, share, "size: largest true box / image, area")
    by_shape = pictures.errors_by(subject.results, aspect, "shape: width / height of the largest true box")
    return f'<div class="row pairs">{pictures.overlaps(subject.results)}{by_size}{by_shape}</div>'


def _classes(subject: Subject) -> str:
    """Correct localisation by class, the worst ones."""
    shards, results = subject.shards, subject.results
    counts = class_counts(results.labels, results.given_ious[-1], len(shards.wnids), ~results.counted)
    shares = corloc(counts)
    worst = [int(c) for c in np.argsort(shares, kind="stable")[:WORST_CLASSES] if shares[c] < 1]
    perfect, there = int((shares == 1).sum()), int((counts[:, 0] > 0).sum())
    text = (
        "<p>CorLoc is the share of a class's images whose box is right, the class given; "
        f"{percent(float(np.nanmean(shares)))} as the mean of classes. "
        f"All boxes of {perfect:,} of {there:,} classes are right."
    )
    if not worst:
        return f"{text}</p>"
    rows = (
        (escape(shards.class_names[c]), escape(shards.wnids[c]), f"{counts[c, 0]:,}", percent(shares[c]))
        for c in worst
    )  # fmt: skip
    table = evaluation.table(("class", "WNID", "images", "CorLoc"), rows)
    return f"{text} The lowest:</p>{table}"


def _next(subject: Subject) -> Iterator[str]:
    metrics, params = subject.metrics, subject.params
    given = {mode: found["error"] for mode, found in metrics["class_given"].items()}
    if metrics["class_given"]["centre_crop"]["interval"][1] >= metrics["floors"]["mean_box"]:
        yield (
            "The central crop is not clearly better than the mean box of training: the network has learnt little of "
            "where things are. More epochs, another <code>localise.learning_rate</code>, or <code>trainable: all"
            "</code>."
        )
    if given["merged"] > given["best_window"]:
        yield (
            "Merging is worse than the best single window: <code>localise.merge_threshold</code> "
            f"({params['merge_threshold']:g}) or <code>test_scales</code> do not suit these images."
        )
    if metrics["top5_classification_error"] > metrics["top5_localisation_error"] / 2:
        yield (
            "Most of the top-5 error is of classes, not of boxes: better classifiers in "
            "<code>localise.classify</code>, as in the paper."
        )
    if len(params["test_scales"]) == 1:
        yield "<code>localise.test_scales</code>: a second one gained 0.7 points in the paper (Table 9)."
    if params["trainable"] != "all":
        yield "<code>localise.trainable: all</code> gained 1.2 points in the paper (Table 8)."
    if not params["fuse"]:
        yield "<code>localise.fuse</code>: the boxes of a localiser of another scale S gained 0.6 points (Table 9)."
    yield "<code>val.pred.det.txt</code> beside the boxes is for ILSVRC's own evaluation."
