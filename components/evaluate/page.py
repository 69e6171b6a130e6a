"""The evaluation as one self-contained HTML page: for Kubeflow, MLflow, DVC, a browser, or a printer."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.evaluate import drawings, published
from components.evaluate.confusion import matrix, most_misclassified
from components.evaluate.subject import Subject, curves, facts
from components.evaluate.tiles import kinds, tiles
from vgg.evaluation.modes import sentence
from vgg.evaluation.predictions import calibration, class_errors

WORST_CLASSES = 20
STYLE = """
:root { color-scheme: light } * { box-sizing: border-box }
body { font: 15px/1.55 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { line-height: 1.2; margin-bottom: .2rem } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d9dee3 }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d9dee3; text-align: right; vertical-align: top }
th { font-weight: 600 } th:first-child, td:first-child, td.text, th.text { text-align: left }
tr.headline { background: #eef5ff } tr.headline td:first-child { font-weight: 600 }
small, .quiet { color: #57606a } code { font-size: 12.5px; overflow-wrap: anywhere }
td.text { overflow-wrap: anywhere }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem }
figure { margin: 0 } svg { width: 100%; font: 11px system-ui, sans-serif; fill: #57606a }
svg .grid { stroke: #e6e9ed } svg .diagonal { stroke: #57606a; stroke-dasharray: 4 4 }
figcaption { font-size: 13px; line-height: 1.35; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem }
.tile img { width: 160px; max-width: 100%; display: block; margin-bottom: .3rem }
table.confusion td, table.confusion th { padding: .15rem .4rem; font-size: 12px; text-align: center }
table.confusion th.text { text-align: left; white-space: nowrap }
@media print {
  body { font-size: 11px; max-width: none; margin: 0 } h2 { break-after: avoid } figure, tr { break-inside: avoid }
  .scroll { overflow: visible } .row { grid-template-columns: 1fr 1fr } .tiles { grid-template-columns: repeat(4, 1fr) }
}
"""


def page(subject: Subject) -> bytes:
    metrics, rows = subject.metrics, subject.evaluation.predictions
    title = f"{percent(metrics['top1_error'])} top-1, {percent(metrics['top5_error'])} top-5 error"
    low, high = (percent(bound) for bound in metrics["top1_interval"])
    what = sentence(metrics["modes"][metrics["headline"]]["protocol"])
    images = "".join(
        f"<h3>{kind.title}</h3><p>{kind.text}</p>{tiles(subject.shards, rows, kind.numbers)}" for kind in kinds(rows)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>VGG: {title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{metrics["num_images"]:,} validation images of {len(subject.shards.wnids):,} classes of
{escape(subject.shards.manifest["dataset"])}; top-1 error between {low} and {high} with 95 % confidence.<br>
Headline: {what} (<code>{escape(metrics["headline"])}</code>).</p>
<h2>What was trained</h2>{facts(subject)}
<h2>Results</h2>{_modes(metrics)}{_beside_the_paper(metrics)}
{curves(subject.trained)}
<h2>Calibration</h2>{_calibration(metrics, rows)}
<h2>Classes</h2>{_classes(subject)}
<h2>Confusion</h2>{_confusion(subject)}
<h2>Images</h2>{images}
<h2>What to do next</h2>{_next(subject)}
</body></html>
""".encode()


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}&nbsp;%"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Of cells in HTML."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'


def _modes(metrics: dict[str, Any]) -> str:
    hierarchical = any("hierarchical_error" in result for result in metrics["modes"].values())
    head = ["mode", "top-1 error", "95 %", "top-5 error", "95 %", "NLL", "calibration"]
    rows = []
    for name, result in metrics["modes"].items():
        one, five = (
            (percent(result[f"top{k}_error"]), " – ".join(percent(b) for b in result[f"top{k}_interval"]))
            for k in (1, 5)
        )
        cells = [*one, *five, f"{result['loss']:.4f}", percent(result["calibration_error"])]
        cells += [f"{result['hierarchical_error']:.3f}"] if hierarchical else []
        what = f"{escape(name)}<br><small>{sentence(result['protocol'])}</small>"
        mark = ' class="headline"' if name == metrics["headline"] else ""
        rows.append(f"<tr{mark}><td>{what}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head += ["hierarchical"] if hierarchical else []
    header = "".join(f"<th>{cell}</th>" for cell in head)
    return (
        f'<div class="scroll"><table><tr>{header}</tr>{"".join(rows)}</table></div>'
        '<p class="quiet">Intervals: Wilson. NLL: negative log-likelihood, nats. Calibration: mean difference of '
        "confidence and accuracy.</p>"
    )


def _beside_the_paper(metrics: dict[str, Any]) -> str:
    """Rows of Tables 3 to 5 for this network, where the images are those of the paper."""
    trained = metrics["training"]
    scale = published.scale_of(trained["train_scale"])
    if not published.is_of(metrics["dataset"], metrics["num_images"]) or trained["batch_norm"]:
        return ""
    rows = []
    for number, published_rows in published.TABLES.items():
        for row in published_rows:
            if (row.configuration, row.train_scale) != (trained["configuration"], scale):
                continue
            for result in metrics["modes"].values():
                protocol = result["protocol"]
                if (protocol["method"], tuple(protocol["scales"])) == (row.method, row.test_scales):
                    ours = f"{percent(result['top1_error'])} / {percent(result['top5_error'])}"
                    theirs = f"{row.top1_error} / {row.top5_error}"
                    rows.append((f"Table {number}: {sentence(protocol)}", ours, theirs))
    if not rows:
        return ""
    return "<h3>Beside the paper</h3>" + table(("arXiv 1409.1556", "top-1 / top-5 error here", "paper, %"), rows)


def _calibration(metrics: dict[str, Any], rows: NDArray[np.void]) -> str:
    mode = rows["modes"][:, -1]
    bins = calibration(mode["probabilities"][:, 0], mode["rank"] == 0)
    confidence = float(mode["probabilities"][:, 0].astype(np.float64).mean())
    verdict = "surer than it is right" if confidence > 1 - metrics["top1_error"] else "less sure than it is right"
    text = (
        f"On average the network is {percent(confidence)} sure and {percent(1 - metrics['top1_error'])} right: "
        f"{verdict}. Mean difference over {len(bins)} intervals of confidence: {percent(metrics['calibration_error'])}."
    )
    return f'<div class="row">{drawings.reliability(bins)}<p>{text}</p></div>'


def _classes(subject: Subject) -> str:
    shards = subject.shards
    counts = class_errors(subject.evaluation.predictions, len(shards.wnids))
    rates = counts[:, 1] / np.maximum(counts[:, 0], 1)
    worst = [int(c) for c in np.argsort(-rates, kind="stable")[:WORST_CLASSES] if counts[c, 1]]
    perfect = int(((counts[:, 1] == 0) & (counts[:, 0] > 0)).sum())
    text = f"<p>{perfect:,} of {len(counts):,} classes have no error."
    if not worst:
        return f"{text}</p>"
    rows = (
        (
            escape(shards.class_names[c]), escape(shards.wnids[c]), f"{counts[c, 0]:,}",
            percent(rates[c]), percent(counts[c, 2] / counts[c, 0]),
        )
        for c in worst
    )  # fmt: skip
    return f"{text} Those with the highest top-1 error:</p>" + table(
        ("class", "WNID", "images", "top-1 error", "top-5 error"), rows
    )


def _confusion(subject: Subject) -> str:
    """Rows: true classes; columns: predicted ones.  Only the most misclassified, if there are many."""
    shards, counts = subject.shards, matrix(subject.shards, subject.evaluation)
    shown = most_misclassified(counts)
    names = [escape(shards.class_names[c]) for c in shown]
    head = "<th></th>" + "".join(f'<th title="{name}">{number}</th>' for number, name in enumerate(names, 1))
    body = []
    for number, (true, name) in enumerate(zip(shown, names, strict=True), 1):
        cells, total = [], max(1, int(counts[true].sum()))
        for predicted in shown:
            count = int(counts[true, predicted])
            hue = "31, 111, 235" if true == predicted else "188, 76, 0"
            shade = f' style="background: rgba({hue}, {min(1.0, 0.12 + 0.6 * count / total):.2f})"' if count else ""
            cells.append(f"<td{shade}>{count or ''}</td>")
        body.append(f'<tr><th class="text">{number} {name}</th>{"".join(cells)}</tr>')
    many = f" The {len(shown)} most misclassified classes." if len(shown) < len(counts) else ""
    return (
        f"<p>Rows are true classes, columns predicted ones, in the same order.{many}</p>"
        f'<div class="scroll"><table class="confusion"><tr>{head}</tr>{"".join(body)}</table></div>'
    )


def _next(subject: Subject) -> str:
    metrics, train = subject.metrics, subject.trained.manifest["run"].get("train", {})
    advice = []
    methods = {result["protocol"]["method"] for result in metrics["modes"].values()}
    if not {"dense", "multi_crop"} <= methods:
        advice.append("<code>evaluate.methods: [dense, multi_crop]</code> adds the average of both (Table 5).")
    if metrics["headline"] != "fusion":
        advice.append("<code>evaluate.fuse</code> averages other networks' predictions of these images (Table 6).")
    if train and isinstance(train["train_scale"], int) and train["crop"] == "scale":
        advice.append("Trained at one scale: fine-tuning with scale jitter is what helped most in the paper (§4.1).")
    if metrics["calibration_error"] > 0.05:
        advice.append("The confidences are off by more than 5 points: do not use them as probabilities.")
    advice.append("<code>python -m components.evaluate compare OTHER PREDICTIONS</code>: is a change one?")
    advice.append("<code>python -m components.classify CHECKPOINT photo.jpg</code>: try it on your own images.")
    return f"<ul>{''.join(f'<li>{line}</li>' for line in advice)}</ul>"
