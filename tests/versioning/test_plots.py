"""What DVC's plots are made of: a page that loads nothing, a confusion matrix that stays small."""

import csv
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
from conftest import ROOT
from dvc_render import VegaRenderer
from dvc_render.html import HTML
from ruamel.yaml import YAML

from components import plotspage
from components.evaluate import confusion


def test_the_page_holds_its_scripts() -> None:
    """So it shows without a network: looked at in Chromium 153."""
    assert "html_template = plots/page.html" in (ROOT / ".dvc/config").read_text()
    filled = HTML(plotspage.page()).with_scripts(VegaRenderer.SCRIPTS).with_element("<div>a plot</div>").embed()
    assert "<div>a plot</div>" in filled
    [script] = re.findall(r"<script>(.*?)</script>", filled, re.DOTALL)
    assert "vegaEmbed" in script
    assert len(script) > 500_000
    assert not re.search(r"(src|href)=", filled.replace(script, ""))


def test_every_plot_has_its_template_and_no_name_that_dvc_takes_for_a_failure() -> None:
    plots = {name: body for plot in YAML(typ="safe").load(ROOT / "dvc.yaml")["plots"] for name, body in plot.items()}
    assert "error" not in plots  # DVC searches its answer for this key, and says 'failed to load some plots'
    template = json.loads((ROOT / f".dvc/plots/{plots['confusion']['template']}.json").read_text())
    assert [layer["encoding"] for layer in template["spec"]["layer"]][1]["text"]["field"] == "images"


def test_the_confusion_of_many_classes_is_small_and_complete() -> None:
    """A thousand classes, two with one name, a comma in each: at most 31 rows of 31, and every image is counted."""
    random = np.random.default_rng(1)
    rows = np.zeros(50_000, [("label", "i4"), ("modes", [("classes", "i4", (2, 5))])])
    rows["label"] = random.integers(0, 1000, len(rows))
    rows["modes"]["classes"][:, -1, 0] = np.where(random.random(len(rows)) < 0.7, rows["label"], rows["label"][::-1])
    shards: Any = SimpleNamespace(
        wnids=[f"n{i:04d}" for i in range(1000)],
        class_names=["crane, bird" if i < 2 else f"class {i}, of many" for i in range(1000)],
    )
    evaluation: Any = SimpleNamespace(predictions=rows)
    counted = list(csv.DictReader(confusion.table(shards, evaluation).decode().splitlines()))
    assert len(counted) <= 31 * 31
    assert sum(int(row["images"]) for row in counted) == len(rows)
    assert len({(row["actual"], row["predicted"]) for row in counted}) == len(counted)
    assert {row["actual"] for row in counted} >= {"(others)"}
    assert all(re.fullmatch(r"n\d{4} (crane|class \d+)|\(others\)", row["actual"]) for row in counted)
    shown = confusion.for_kubeflow(shards, evaluation)["confusionMatrix"]
    assert sum(sum(row["row"]) for row in shown["rows"]) == len(rows)
