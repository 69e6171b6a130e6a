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
COLUMNS = (
    "metrics.`top1_error_percent`",
    "metrics.`top5_error_percent`",
    "params.`train.configuration`",
    "params.`train.learning_rate`",
    "params.`train.epochs`",
    "attributes.`Models`",
    "attributes.`Dataset`",
)
CHARTS = {  # section: title and metrics of every chart
    "Training": {
        "top-1 error %": [CURVES["train/top1_error"], CURVES["val/top1_error"]],
        "top-5 error %": [CURVES["val/top5_error"]],
        "loss": [CURVES["train/loss"], CURVES["val/loss"]],
        "learning rate": [CURVES["learning_rate"]],
    },
    "Speed": {"images per second": [SPEED], "waiting for data %": [DATA_WAIT]},
    "Results": {
        "top-1 error %": ["top1_error_percent"],
        "top-5 error %": ["top5_error_percent"],
        "loss of the evaluation": ["loss"],
    },
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
        for title, metrics in content.items():
            chart = _chart(metrics[0], section, title, "BAR" if section == "Results" else "LINE")
            charts.append(chart if len(metrics) == 1 else {**chart, "selectedMetricKeys": metrics})
            # a chart of its own for every other metric, which MLflow would add, counts as deleted
            charts += [{**_chart(name, section, title, "LINE"), "deleted": True} for name in metrics[1:]]
    charts += [{**_chart(name, "Results", name, "BAR"), "deleted": True} for name in HIDDEN]
    sections = [{"uuid": name, "name": name, "display": True, "isReordered": True} for name in CHARTS]
    view = {
        "selectedColumns": COLUMNS, "compareRunCharts": charts, "compareRunSections": sections,
        "isAccordionReordered": True,
    }  # fmt: skip
    return json.dumps(view, separators=(",", ":"))


def _chart(metric: str, section: str, title: str, kind: str) -> dict[str, Any]:
    chart = {"uuid": metric, "type": kind, "metricSectionId": section, "metricKey": metric, "displayName": title}
    line: dict[str, Any] = {
        "xAxisKey": "step", "yAxisKey": "metric", "xAxisScaleType": "linear",
        "scaleType": "log" if metric.startswith("loss/") else "linear", "range": {}, "lineSmoothness": 0,
        "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip
    return {**chart, **line} if kind == "LINE" else chart


def address(server: str, experiment_id: str) -> str:
    """The list of runs, in the half of MLflow's pages that is about training, with this view.  server: its address."""
    query = f"workflowType=machine_learning&viewStateShareKey={NAME}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"
