"""Stage 4 of 4: gate against the champion → package → serving check → a model version with its whole lineage.

A model that passes the absolute rules of the gate gets a version, alias challenger.  If it is not inferior to the
champion, and better, it becomes the champion, and the champion before it `previous`.  If the gate fails, the program
reports the reasons and exits with 78.  Every rule is in gate.json and gate.md, beside --metrics.  Registering the same
weights again returns the existing version.  With --localiser the version also gives boxes; the gate is on
classification alone, and the same weights with another localiser, or without, are another version.  If the weights are
the champion's, that version is the champion from then on.
Put the champion before back:  python -m components.register rollback [--model-name NAME]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import program

if TYPE_CHECKING:
    from components.register.promotion import Outcome


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("register", __doc__)
    flags.add_argument("--shards", required=True, metavar="DIR", help="in: the shard stage's output")
    flags.add_argument("--checkpoint", required=True, metavar="DIR", help="in: the train stage's output")
    flags.add_argument("--predictions", required=True, metavar="DIR", help="in: the evaluate stage's output")
    flags.add_argument("--evaluation", required=True, metavar="FILE", help="in: the evaluate stage's metrics")
    flags.add_argument("--localiser", metavar="DIR", help="in: the localise stage's output, if there is that stage")
    flags.add_argument("--localisations", metavar="DIR", help="in: and what it has found; both or none")
    flags.add_argument(
        "--metrics",
        required=True,
        metavar="FILE",
        help="out: name, version and aliases, JSON; written last; beside it gate.json, gate.md",
    )
    add_replace_champion(flags)
    program.add_executor_input(flags)
    return flags


def add_replace_champion(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--replace-champion", action="store_true",
        help="make this model the champion without comparing it: the absolute rules of the gate hold; recorded in tags",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["rollback"]:
        from components.register import rollback

        rollback.main(arguments[1:])
        return
    args = parser().parse_args(arguments)
    program.expect_one_process("components.register")
    from components.register import registry, verdict
    from components.register.compare import Judge
    from components.register.promotion import register
    from components.register.version import page
    from components.register.version.package import Package
    from components.register.version.stored import Packaged
    from components.stage import Stage
    from runtime.store.place import downloaded
    from vgg.params.register import RegisterParams

    if bool(args.localiser) != bool(args.localisations):
        parser().error("--localiser and --localisations belong together: give both, or none")
    stage = Stage("register", args, RegisterParams)
    evaluation = registry.read_evaluation(Path(args.evaluation))
    package = Package.open(
        stage.open_shards(),
        downloaded(args.checkpoint),
        downloaded(args.predictions),
        evaluation,
        stage.params,
        (downloaded(args.localiser), downloaded(args.localisations)) if args.localiser else None,
    )
    stage.expect("checkpoint", args.checkpoint, package.trained.digest)
    stage.expect("predictions", args.predictions, package.predictions_digest)
    stage.inputs["weights_sha256"] = package.trained.weights_sha256
    if localiser := package.localiser:
        stage.expect("localiser", args.localiser, localiser.trained.digest)
        stage.expect("localisations", args.localisations, localiser.localisations_digest)
        stage.inputs["localiser_sha256"] = localiser.weights_sha256
    name, replace = stage.params.model_name, bool(args.replace_champion)
    with stage.tracked(args.metrics) as tracker, registry.open_registry(name) as models:
        judge = Judge(stage.params.gate, models, package.shards, evaluation, package.predictions, replace)
        candidate = Packaged(models.client, name, package, stage.record, tracker)
        outcome = register(models, candidate, judge, replace)
        for path in verdict.write(Path(args.metrics).parent, name, outcome.verdict, judge.challenger, judge.champion):
            tracker.artifact(path, "gate")
        tracker.tags({"vgg.gate": "; ".join(outcome.verdict.failures()) or "passed"}, to="both")
        if outcome.version:
            tracker.tags({"vgg.model": f"{name}/{outcome.version}"}, to="both")
            page.link(models.client, tracker, name, outcome.version, package)
        expect_passed(name, outcome)
        metrics = results(name, outcome, evaluation)
        if package.localiser:
            metrics["localiser_sha256"] = package.localiser.weights_sha256
        stage.finish(metrics, {"model": metrics["uri"]})
    program.log.info(
        "%s version %s is %s%s",
        name, outcome.version, outcome.role,
        "" if outcome.is_new else " (these weights were registered before)",
    )  # fmt: skip


def expect_passed(name: str, outcome: Outcome) -> None:
    """Raises Refused with the reasons if the gate failed, and says what has become of the model."""
    from runtime.errors import Refused

    if outcome.verdict.passed:
        return
    listing = "\n".join(f"  {reason}" for reason in outcome.verdict.failures())
    became = "no version registered"
    if outcome.version:
        became = f"version {outcome.version} is {outcome.role}"
    raise Refused(f"{name}: gate failed; {became}:\n{listing}")


def results(name: str, outcome: Outcome, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The metrics of the stage."""
    return {
        "model_name": name,
        "version": int(outcome.version),
        "uri": f"models:/{name}@champion" if outcome.is_champion else f"models:/{name}/{outcome.version}",
        "role": "champion" if outcome.is_champion else "challenger",
        "weights_sha256": evaluation["weights_sha256"],
        "top1_error": evaluation["top1_error"],
        "top5_error": evaluation["top5_error"],
    }


if __name__ == "__main__":
    program.run(main)
