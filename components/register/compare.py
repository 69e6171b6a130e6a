"""What the gate says of a model, given the champion, whose predictions are read from its version or made again."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from components.evaluate import hits
from components.register.champion import Champion
from components.register.registry import ROLLED_BACK, Registry, State, recorded
from components.register.version.stored import FILES_TAG, downloaded, fetched, verify_files
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet
from vgg.evaluation.gate import Contender, Hits, Verdict, judge
from vgg.params.register import Gate

log = logging.getLogger("vgg.register")


class Judge:
    """The gate for one model, called with the state of the registry.  replace: do not compare with the champion.

    evaluation: metrics of the evaluate stage.  predictions: its rows, of every validation image of the shards.
    """

    def __init__(
        self,
        gate: Gate,
        models: Registry,
        shards: ShardSet,
        evaluation: dict[str, Any],
        predictions: np.ndarray,
        replace: bool = False,
    ) -> None:
        self.gate, self.models, self.shards, self.replace = gate, models, shards, replace
        found = hits.hits_of(predictions, evaluation["data_digest"])
        self.challenger = Contender("this model", evaluation["weights_sha256"], evaluation, found)
        self.champion: Contender | None = None  # of the last call
        self._known: dict[str, Hits | None] = {}

    def __call__(self, state: State) -> Verdict:
        if state.orphans:
            log.warning(
                "registered model %r has version%s %s, but none has the alias champion; was it deleted? There is "
                "nothing to compare with, so this model becomes champion if it passes the absolute rules of the gate",
                self.models.name, "s"[: len(state.orphans) - 1], ", ".join(state.orphans),
            )  # fmt: skip
        self.champion = self._contender(state.champion) if state.champion else None
        split = self.shards.split("val")
        back = "" if self.replace else rolled_back(state, self.challenger.weights_sha256)
        return judge(self.gate, self.challenger, self.champion, len(split), self.shards.digest, back)

    def _contender(self, champion: Champion) -> Contender:
        name = f"{self.models.name} version {champion.version}"
        if champion.weights_sha256 == self.challenger.weights_sha256:
            return Contender(name, champion.weights_sha256, champion.evaluation, None)
        found = self._stored(champion)
        if found is None and self.gate.incomparable_champion == "reevaluate":
            found = self._known[champion.version] = reevaluated(self.models, champion, self.shards)
        return Contender(name, champion.weights_sha256, champion.evaluation, found)

    def is_quick(self, state: State) -> bool:
        """Whether the champion need not be evaluated."""
        found = state.champion
        if found is None or found.weights_sha256 == self.challenger.weights_sha256:
            return True
        return self.gate.incomparable_champion == "refuse" or self._stored(found) is not None

    def _stored(self, champion: Champion) -> Hits | None:
        """The champion's predictions of these images; None if there are none."""
        if champion.version not in self._known:
            found = stored_hits(self.models.name, champion)
            self._known[champion.version] = found if found and found.data_digest == self.shards.digest else None
        return self._known[champion.version]


def rolled_back(state: State, weights_sha256: str) -> str:
    """How these weights were put back, in words; "" if they were not."""
    for version in state.of(weights_sha256):
        back = recorded(version, ROLLED_BACK)
        if back and str(version.version) != state.holder:
            when, who = back.get("at", "an unknown time"), back.get("by", "somebody")
            return f"were champion as version {version.version} and rolled back at {when} by {who}"
    return ""


def stored_hits(name: str, champion: Champion) -> Hits | None:
    """The file per_image.json of the champion; None if it has none.  Raises Refused if it contradicts the tags."""
    where = f"{name} version {champion.version}: {hits.FILE}"
    with tempfile.TemporaryDirectory() as scratch:
        path = fetched(f"models:/{name}/{champion.version}/artifacts/{hits.FILE}", scratch)
        if path is None or not path.is_file():
            return None
        found = hits.read(path.read_bytes(), where)
    stated = champion.evaluation
    same = found.errors() == (stated["top1_error"], stated["top5_error"]) and len(found.top1) == stated["num_images"]
    if found.data_digest != stated["data_digest"] or not same:
        raise Refused(
            f"{where}: is not of the evaluation that the version's tag states (top1_error {found.errors()[0]:.4f} and "
            f"{stated['top1_error']:.4f}). Restore it, or replace the champion with --replace-champion."
        )
    return found


def reevaluated(models: Registry, champion: Champion, shards: ShardSet) -> Hits:
    """Evaluate the champion on other shards, with its own parameters of evaluation.

    Raises Refused if its files are gone or damaged, or its classes are others.
    """
    from runtime.distributed import joined
    from vgg.evaluation.evaluate import evaluate

    name = f"{models.name} version {champion.version}"
    log.info("%s: has no predictions for %s; it is evaluated on them now", name, shards.digest)
    shards.verify(0, 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = downloaded(f"models:/{models.name}/{champion.version}", scratch)
        if folder is None:
            raise Refused(f"{name}: its files are gone, so it cannot be evaluated. {_way_out(models.name)}")
        files = folder / "artifacts"
        try:
            tags = models.client.get_model_version(models.name, champion.version).tags
            verify_files(folder, tags.get(FILES_TAG, ""), champion.weights_sha256)
        except Refused as damage:
            raise Refused(f"{name}: damaged, so it cannot be evaluated: {damage}. {_way_out(models.name)}") from None
        description = json.loads((files / "network.json").read_bytes())
        wnids = [c["wnid"] for c in description["classes"]]
        if wnids != list(shards.wnids):
            raise Refused(f"{name}: has other classes than {shards.address}. Use another model_name for them.")
        trained = _trained(files, description, shards)
        with joined() as group:
            evaluation = evaluate(evaluate_params(description), trained, shards, group, lambda *_: None)
    assert evaluation  # of the only rank
    return hits.hits_of(evaluation.predictions, shards.digest)


def evaluate_params(description: dict[str, Any]) -> Any:
    """How a version was evaluated.  Versions made before there were several methods do not state what was fixed."""
    from vgg.params.evaluate import EvaluateParams

    fixed = {"methods": ["dense"], "average": "posteriors", "filter": "bilinear", "fuse": [], "precision": "fp32"}
    return EvaluateParams.model_validate({**fixed, **description["evaluate"]})


def _trained(files: Path, description: dict[str, Any], shards: ShardSet) -> Any:
    """The network of a version as the evaluate stage gets it."""
    from runtime.checkpoint import Step
    from vgg.network.trained import Trained

    run = {"data": {"classes_sha256": shards.classes_sha256}}
    return Trained(files, {**description, "run": run}, Step(files, 0, {}, {}), "")


def _way_out(name: str) -> str:
    return f"Restore them in MLflow's artifact store, or replace the champion of {name} with --replace-champion."
