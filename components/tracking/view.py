"""A saved view of the experiment in MLflow's pages: columns of the list, and charts with train and val in one.

MLflow draws a chart for every metric unless a view says otherwise.  The view is a tag of the experiment, as its button
"Share view" writes it, and an address names it.  Own views and columns of a user are not touched.
"""

from __future__ import annotations

import json
from typing import Any

from components.tracking.names import CURVES, DATA_WAIT, SPEED

NAME = "vgg"
TAG = f"mlflow.sharedViewState.{NAME}"
COLUMNS = {  # name in MLflow: width, pixels
    "attributes.`Run Name`": 340,  # shows the whole name
    "runDateAndNestInfo": 160,
    "duration": 80,
    "metrics.`top1_error_percent`": 140,
    "metrics.`top5_error_percent`": 140,
    "params.`train.configuration`": 140,
    "params.`train.learning_rate`": 140,
    "params.`train.epochs`": 110,
}
CHARTS = {  # section: the metrics of every chart
    "Training": [
        [CURVES["train/top1_error"], CURVES["val/top1_error"]],
        [CURVES["train/loss"], CURVES["val/loss"]],
        [CURVES["val/top5_error"]],
        [CURVES["learning_rate"]],
    ],
    "Speed": [[SPEED], [DATA_WAIT]],
    "Results": [["top1_error_percent"], ["top5_error_percent"], ["loss"]],
}
HIDDEN = (  # in charts; the table of a run has them
    "top1_error",
    "top5_error",
    "final_val_top1_error",
    "final_val_top1_error_percent",
    "best_val_top1_error",
    "best_val_top1_error_percent",
)


def state() -> str:
    """The view as MLflow's pages read it, JSON below the 5,000 characters of a tag of an experiment."""
    charts: list[dict[str, Any]] = []
    for section, content in CHARTS.items():
        for metrics in content:
            chart = _chart(metrics[0], section)
            charts.append(chart if len(metrics) == 1 else {**chart, "selectedMetricKeys": metrics})
            # a chart of its own for every other metric, which MLflow would add, counts as deleted
            charts += [{**_chart(name, section), "deleted": True} for name in metrics[1:]]
    charts += [{**_chart(name, "Results"), "deleted": True} for name in HIDDEN]
    view = {
        "selectedColumns": [name for name in COLUMNS if "s.`" in name and "Run Name" not in name],
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
        "compareRunCharts": charts,
        "compareRunSections": [{"uuid": name, "name": name, "display": True, "isReordered": True} for name in CHARTS],
        "isAccordionReordered": True,
    }
    return json.dumps(view, separators=(",", ":"))


def _chart(metric: str, section: str) -> dict[str, Any]:
    chart = {"uuid": metric, "type": "BAR", "metricSectionId": section, "metricKey": metric}
    if section == "Results":
        return chart
    return {
        **chart, "type": "LINE", "xAxisKey": "step", "yAxisKey": "metric", "xAxisScaleType": "linear",
        "scaleType": "log" if metric.startswith("loss/") else "linear", "range": {}, "lineSmoothness": 0,
        "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip


def address(server: str, experiment_id: str) -> str:
    """The list of runs, in the half of MLflow's pages that is about training, with this view.  server: its address."""
    query = f"workflowType=machine_learning&viewStateShareKey={NAME}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"
