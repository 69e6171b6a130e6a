"""What the report is about: the network, its training, and what is known of both."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from components.evaluate import drawings, published
from components.weights import origin
from runtime.shards.shardset import ShardSet
from vgg.evaluation.evaluate import Evaluation
from vgg.network.trained import Trained


@dataclass(frozen=True)
class Subject:
    """What the page is about.  record: provenance of this stage; training: the training's record, if it is there."""

    shards: ShardSet
    trained: Trained
    evaluation: Evaluation
    metrics: dict[str, Any]
    record: dict[str, Any]
    training: dict[str, Any] | None


def facts(subject: Subject) -> str:
    """A table: network, training, data, code and machine."""
    content = subject.trained.manifest
    network, run = content["network"], content["run"]
    imported = origin.imported(content)
    norm = " with batch normalisation" if network["batch_norm"] else ""
    known = {
        "network": f"VGG, configuration {network['configuration']}{norm}, {network['input_size']} pixels, "
        f"{network['classifier_width']:,} outputs of fc6 and fc7",
        "training": origin.in_words(imported) if imported else _training(run["train"]),
        "trained on": data_of(run["data"], subject.shards),
        **({"trained by": made_by(subject.training)} if subject.training else {}),
        "evaluated by": commit_of(subject.record),
        "options": _options(subject.record["params"]),
        "weights": f"sha256 {subject.trained.weights_sha256}",
    }
    rows = "".join(f'<tr><td>{name}</td><td class="text">{escape(text)}</td></tr>' for name, text in known.items())
    return f"<table>{rows}</table>"


def data_of(data: dict[str, Any], shards: ShardSet) -> str:
    """On which images something was trained.  data: of its checkpoint."""
    digest = data.get("digest")
    if digest is None:
        return "unknown"
    return f"{shards.manifest['dataset']}, shards {digest}" if digest == shards.digest else f"other shards, {digest}"


def _training(train: dict[str, Any]) -> str:
    scale = published.shown_scale(published.scale_of(train["train_scale"]))
    return (
        f"{train['epochs']} epochs, batch {train['batch_size']}, rate {train['learning_rate']:g}, momentum "
        f"{train['momentum']:g}, weight decay {train['weight_decay']:g}, dropout {train['dropout']:g}, "
        f"{'crops of random area' if train['crop'] == 'area' else f'S = {scale}'}"
        f"{', mirrored' if train['flip'] else ''}, seed {train['seed']}"
    )


def _options(evaluate: dict[str, Any]) -> str:
    """What the paper leaves open, or what one may choose otherwise."""
    softmax = "over positions, then softmax" if evaluate["softmax"] == "after_mean" else "of the softmax per position"
    return (
        f"{evaluate['weights']} weights; images resized by a {evaluate['filter']} filter, antialiased; dense: mean "
        f"{softmax}; {evaluate['average']} averaged over mirror images, crops, scales, methods; sizes of pooled maps "
        f"rounded {'up' if evaluate['ceil_pooling'] else 'down'}; precision {evaluate['precision']}"
    )


def made_by(record: dict[str, Any]) -> str:
    """By which code, on what, when and in how many hours."""
    machine = record["machine"]
    ranks = f", {machine['ranks']} processes" if machine["ranks"] > 1 else ""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    hours = f"finished {record['finished']}, {record['hours_since_last_start']:.2f} hours after its last start"
    return "; ".join([commit_of(record), f"{where}{ranks}", hours])


def commit_of(record: dict[str, Any]) -> str:
    """By which code.  record: of a stage."""
    git = record["code"]["git"]
    commit = f"commit {str(git['commit'])[:12]}{' with changes' if git['dirty'] else ''}" if git["commit"] else "no git"
    return f"{commit}, torch {record['libraries'].get('torch')}"


def curves(trained: Trained) -> str:
    """Learning curves, if more than one epoch is known."""
    history = trained.step.state.get("history", [])
    if len(history) < 2:
        return ""
    losses = {name: [(row["epoch"], row[f"{name}_loss"]) for row in history] for name in ("train", "val")}
    errors = {
        "train top-1": [(row["epoch"], 100 * row["train_top1_error"]) for row in history],
        "val top-1": [(row["epoch"], 100 * row["val_top1_error"]) for row in history],
        "val top-5": [(row["epoch"], 100 * row["val_top5_error"]) for row in history],
    }
    pictures = drawings.curves(losses, "epoch", "loss") + drawings.curves(errors, "epoch", "error, %")
    return (
        f'<h2>Learning curves</h2><div class="row">{pictures}</div><p class="quiet">Validation during training: one '
        "central crop cut from the source at one scale, not the evaluation above.</p>"
    )
