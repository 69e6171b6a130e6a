"""The evaluation as one self-contained HTML page, for Kubeflow, MLflow or a browser."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from runtime.shards.shardset import ShardSet

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .9rem; border-bottom: 1px solid #d9dee3 }
th { text-align: left; font-weight: 600 } td { text-align: right } td:first-child { text-align: left }
tr.headline { background: #eef5ff; font-weight: 600 } img { max-width: 100% } code { font-size: 13px }
"""


def page(metrics: dict[str, Any], predictions: Path, shards: ShardSet) -> bytes:
    """predictions: folder with confusion.png and mistakes.png."""
    rows = "\n".join(
        f"<tr{' class=headline' if mode == metrics['headline'] else ''}><td>{escape(mode)}</td>"
        f"<td>{100 * result['top1_error']:.2f} %</td><td>{100 * result['top5_error']:.2f} %</td>"
        f"<td>{result['loss']:.4f}</td><td>{result['num_images']:,}</td></tr>"
        for mode, result in metrics["modes"].items()
    )
    title = f"{100 * metrics['top1_error']:.2f} % top-1, {100 * metrics['top5_error']:.2f} % top-5 error"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>VGG: {title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{metrics["num_images"]:,} validation images of {len(shards.wnids):,} classes of
{escape(shards.manifest["dataset"])}, headline: {escape(metrics["headline"])}.</p>
<table><tr><th>mode</th><th>top-1 error</th><th>top-5 error</th><th>loss</th><th>images</th></tr>
{rows}</table>
<h2>Confusion matrix</h2>{_picture(predictions / "confusion.png", "confusion matrix")}
<h2>Most confident errors</h2>{_picture(predictions / "mistakes.png", "misclassified images")}
<p><code>weights {metrics["weights_sha256"]}<br>shards {metrics["data_digest"]}</code></p>
</body></html>
""".encode()


def _picture(path: Path, description: str) -> str:
    return f'<img alt="{description}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
