"""From a reference to its chain: what a link was made from, and that from what, and so on to the source.

Every link is known by its digest.  What is known about it comes from its own manifest, from the runs in MLflow that
made it, from metrics/<stage>.json, and from the version that was made of it; the first that knows a thing is believed,
and --verify finds out whether it is true.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lineage import facts
from components.lineage.links import (
    BOXES,
    DATA,
    EVALUATION,
    LOCALISATIONS,
    LOCALISER,
    OUTPUT,
    STAGE,
    TRAINING,
    VERSION,
    Link,
)
from components.lineage.localised import localised
from components.lineage.places import NETWORKS, Locator, Place, at
from components.lineage.server import Made, reach, record_of
from components.register import tags as version_tags
from components.register.version.stored import FILES_TAG
from runtime import manifest
from runtime.errors import Problem, Refused, WrongParameters
from runtime.store import storage

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<number>[0-9]+)|(?P<alias>@[^/@]+))")
RUN = re.compile(r"[0-9a-f]{32}")
FOLDER = re.compile(r"[0-9a-f]{32}\.dir")
Known = dict[str, Any]  # what a later link says of an earlier one: digest, weights_sha256, params, inputs, record …


class Walk:
    """Builds chains.  project: the folder with dvc.yaml and metrics/.  unasked: what could not be asked, and why."""

    def __init__(self, project: Path) -> None:
        self.server, self._why = reach()
        self.locator = Locator(project)
        self.metrics = {stage: facts.metrics(project, stage) for stage in STAGE.values()}
        self._links: dict[str, Link] = {}

    @property
    def unasked(self) -> list[str]:
        return [*([str(self._why)] if self._why else []), *self.locator.unreachable]

    def _only_mlflow(self, reference: str, but: str) -> Problem:
        """That a reference cannot be looked up: the problem with MLflow, which says what to do."""
        assert self._why
        return type(self._why)(f"{reference}: {but}. {self._why}")

    def start(self, reference: str) -> Link:
        """The link of a reference, with its chain.  Raises Refused if nothing is known under it."""
        if reference.startswith("models:"):
            return self._registered(reference)
        if RUN.fullmatch(reference):
            return self._run(reference)
        if FOLDER.fullmatch(reference):
            found = self.locator.find(reference)
            kinds = [found[0].kind] if found else [k for k in OUTPUT if self.server and self.server.made(k, reference)]
            if not kinds:
                raise Refused(f"{reference}: neither a folder here nor a run in MLflow has this digest.")
            return self.link(kinds[0], {"digest": reference})
        return self._folder(reference)

    def _registered(self, reference: str) -> Link:
        wanted = REGISTERED.fullmatch(reference)
        if not wanted:
            raise WrongParameters(f"{reference}: write models:/NAME@ALIAS or models:/NAME/NUMBER")
        if self.server:
            return self._version(self.server.version(wanted["name"], wanted["alias"] or wanted["number"]))
        found = self.metrics["register"]
        if wanted["name"] != found.get("model_name") or not (
            reference == found.get("uri") or wanted["number"] == str(found.get("version"))
        ):
            raise self._only_mlflow(
                reference, "metrics/register.json is not of this version, and MLflow is not reached"
            )
        return self._version_in_metrics(found)

    def _run(self, run_id: str) -> Link:
        if not self.server:
            raise self._only_mlflow(run_id, "only MLflow knows its runs")
        run = self.server.run(run_id)
        tags = run.data.tags
        if tags.get("vgg.stage") == "pipeline":
            children = [tags[f"vgg.run.{stage}"] for stage in STAGE.values() if f"vgg.run.{stage}" in tags]
            if not children:
                raise Refused(f"run {run_id}: a pipeline run without a stage.")
            return self._run(children[0])
        if model := tags.get("vgg.model"):
            return self._version(self.server.version(*model.rsplit("/", 1)))
        return self._link_of_run(run)

    def _link_of_run(self, run: Run) -> Link:
        tags, run_id = run.data.tags, str(run.info.run_id)
        kind = next((kind for kind, stage in STAGE.items() if stage == tags.get("vgg.stage") and kind in OUTPUT), "")
        digest = tags.get(f"vgg.result.{OUTPUT.get(kind, '')}", "")
        if not kind or not (digest or tags.get("vgg.weights_sha256")):
            what = f"a run of stage {tags['vgg.stage']!r}" if "vgg.stage" in tags else "not a run of this pipeline"
            raise Refused(f"run {run_id}: {what}, {run.info.status}, that records no output. Give a finished one.")
        record = record_of(run)
        return self.link(kind, {"digest": digest, "weights_sha256": tags.get("vgg.weights_sha256"), "record": record})

    def _folder(self, reference: str) -> Link:
        address = storage.resolve(reference).removesuffix(f"/{manifest.NAME}").rstrip("/") or "/"
        place = at("." if address == manifest.NAME else address)
        if place is None:
            raise Refused(
                f"{address}: no finished shards, checkpoint, predictions, boxes or localisations (no "
                f"{manifest.NAME} of these). Check the path, or give models:/NAME@ALIAS or the ID of a run."
            )
        if place.damage:
            raise Refused(place.damage)
        return self.link(place.kind, {"digest": place.digest}, place)

    def _version(self, found: ModelVersion) -> Link:
        assert self.server
        tags = version_tags.read(found.tags)
        link = Link(VERSION, tags.get("weights_sha256", ""), f"models:/{found.name}/{found.version}")
        if aliases := self.server.aliases(found):
            link.facts["aliases"] = ", ".join(aliases)
        link.files_sha256 = tags.get(FILES_TAG, "")
        with suppress(KeyError, ValueError, TypeError):
            link.record = dict(json.loads(tags["provenance"]))
        with suppress(KeyError, ValueError, TypeError):
            link.claims = result = dict(json.loads(tags["evaluation"]))
            link.facts["result"] = f"top-1 error {100 * result['top1_error']:.2f} %, {result['num_images']:,} images"
        if found.run_id:
            link.where.append(f"MLflow run {found.run_id}")
        return self._inputs_of_version(link)

    def _version_in_metrics(self, found: dict[str, Any]) -> Link:
        link = Link(VERSION, found["weights_sha256"], f"models:/{found['model_name']}/{found['version']}")
        link.record = found.get("provenance", {})
        link.where.append("metrics/register.json")
        return self._inputs_of_version(link)

    def _inputs_of_version(self, link: Link) -> Link:
        link.facts = {"weights": link.digest, **link.facts}
        chain, inputs = link.record.get("chain", {}), link.record.get("inputs", {})
        link.params = link.record.get("params", {})
        if not inputs:
            link.notes.append("it has no provenance of this pipeline: its chain is not known")
        # newest first: an evaluation knows its training better than the version does
        known = {EVALUATION: {"digest": inputs.get("predictions"), **chain.get("evaluate", {})}}
        known[TRAINING] = {"digest": inputs.get("checkpoint"), "weights_sha256": link.digest, **chain.get("train", {})}
        known[DATA] = {"digest": inputs.get("shards"), **chain.get("shard", {})}
        known[EVALUATION]["inputs"] = {"checkpoint": known[TRAINING]["digest"], "shards": known[DATA]["digest"]}
        known[EVALUATION]["known"] = {TRAINING: known[TRAINING], DATA: known[DATA]}
        if known[EVALUATION]["digest"]:
            link.inputs.append(self.link(EVALUATION, known[EVALUATION]))
        elif known[TRAINING]["digest"] or link.digest:
            link.inputs.append(self.link(TRAINING, known[TRAINING]))
        if inputs.get("localiser"):
            localiser = {"digest": inputs["localiser"], "weights_sha256": inputs.get("localiser_sha256")}
            localiser |= chain.get("localise", {})
            localiser["known"] = known[EVALUATION]["known"]
            link.inputs.append(self.link(LOCALISER, localiser))
        return link

    def link(self, kind: str, known: Known, given: Place | None = None) -> Link:
        """A link and all below it.  known: what the link above it says, at least its digest or its weights."""
        digest, weights = known.get("digest") or "", known.get("weights_sha256") or ""
        if found := self._links.get(digest or weights):
            return found
        runs = self.server.made(kind, digest, weights) if self.server else []
        runs = runs or (self.server.made(kind, "", weights) if self.server and weights and kind in NETWORKS else [])
        link = self._links[digest or weights] = Link(kind, digest, digest or f"with weights {weights[:16]}")
        link.places = [given] if given else []
        if digest:
            addresses = tuple(dict.fromkeys(run.address for run in runs if run.address))
            others = self.locator.find(digest, addresses)
            link.places += [place for place in others if not given or place.address != given.address]
        elif kind in NETWORKS:
            link.places += self.locator.training_of(weights)
        own = next((place.manifest for place in link.places if not place.damage), {})
        metrics = self._metrics_of(kind, digest, weights)
        link.where = [
            *(p.address for p in link.places),
            *map(str, runs),
            *([f"metrics/{STAGE[kind]}.json"] * bool(metrics)),
        ]
        records = [*(run.record for run in runs), metrics.get("provenance", {}), known.get("record") or {}]
        link.record = next((record for record in records if record), {})
        link.params = facts.params(kind, own) or link.record.get("params") or known.get("params") or {}
        link.code = own.get("run", {}).get("code") or known.get("code") or {}
        link.facts = facts.results(kind, own, metrics, known)
        if not link.record and not (kind == TRAINING and facts.imported(own, known)):
            link.notes.append("commit, image and machine: no run and no file in metrics/ recorded them")
        if kind in NETWORKS and not link.places:
            same = self.locator.training_of(weights)
            link.notes += [f"a copy; but {place.address} has the same weights, in another checkpoint" for place in same]
        if self.server and digest:
            link.used_by = list(dict.fromkeys(self._users(kind, digest, weights or facts.weights(link))))
        link.inputs = list(self._inputs(kind, link, own, known, runs))
        return link

    def _metrics_of(self, kind: str, digest: str, weights: str) -> dict[str, Any]:
        """The file in metrics/ that is about this link; {} if it is about another one."""
        found = self.metrics[STAGE[kind]]
        results = found.get("provenance", {}).get("results", {})
        same = digest and str(results.get(OUTPUT[kind], "")).endswith(f"#{digest}")
        same = same or (kind == DATA and digest and found.get("digest") == digest)
        return found if same or (kind in NETWORKS and weights and found.get("weights_sha256") == weights) else {}

    def _users(self, kind: str, digest: str, weights: str) -> Iterator[str]:
        assert self.server
        for run in self.server.users(kind, digest):
            model = run.data.tags.get("vgg.model")
            yield f"models:/{model}" if model else f"{run.data.tags.get('vgg.stage')} run {run.info.run_id}"
        for version in self.server.versions_of(weights) if kind == TRAINING and weights else ():
            yield f"models:/{version.name}/{version.version}"

    def _inputs(self, kind: str, link: Link, own: dict[str, Any], known: Known, runs: list[Made]) -> Iterator[Link]:
        inputs = {**(known.get("inputs") or {}), **link.record.get("inputs", {}), **own.get("inputs", {})}
        later = known.get("known", {})  # what the version says of the links below
        if kind == EVALUATION:
            below = {**later.get(TRAINING, {}), "known": later}
            named = {"digest": inputs.get("checkpoint"), "weights_sha256": inputs.get("weights_sha256")}
            below |= {name: value for name, value in named.items() if value}
            if below.get("digest") or below.get("weights_sha256"):
                training = self.link(TRAINING, below)
                yield training
                if inputs.get("shards") and not training.find(DATA):  # of an imported network: not what it learned from
                    yield self.link(DATA, {**later.get(DATA, {}), "digest": inputs["shards"]})
            else:
                link.notes.append("it does not say of which weights it is")
        if kind == TRAINING:
            run = own.get("run", {})
            initial = run.get("initial") or inputs.get("initial")
            shards = run.get("data", {}).get("digest") or inputs.get("shards")
            if shards:
                yield self.link(DATA, {**later.get(DATA, {}), "digest": shards})
            elif facts.imported(own, known):
                link.notes.append("the images and the parameters that it was trained with: its file does not say")
            else:
                link.notes.append("it does not say of which shards it is")
            if initial:
                yield self.link(TRAINING, {"weights_sha256": initial})
        if kind in (LOCALISATIONS, LOCALISER, BOXES):
            yield from localised(self.link, link, own, inputs, later)
        if kind == DATA:
            yield facts.source(link, own, known, runs)
