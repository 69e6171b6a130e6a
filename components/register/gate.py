"""The gate as a separate step, so that the register step starts only for a model that may get a version.

It judges by all rules, also those of the comparison with the champion, and reports them: gate.json and gate.md, files
of the run in MLflow.  The answer is whether the absolute rules have passed: then register makes a version, alias
challenger, and judges again, since the champion may have changed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import program
from components.register.__main__ import add_replace_champion
from runtime import manifest

if TYPE_CHECKING:
    from vgg.evaluation.gate import Verdict
    from vgg.params.register import RegisterParams


def gate_passes(section: dict[str, Any], shards: str, predictions: str, evaluation: str) -> bool:
    """Run this program under components.step, with its retries; returns whether the model may be registered.

    section: register of params.yaml.  shards, predictions: their addresses.  evaluation: file of the evaluate stage's
    metrics.
    Exits with the program's code if the program fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        flags = ["--params", json.dumps(section), "--shards", shards, "--predictions", predictions]
        flags += ["--evaluation", evaluation]
        command = [sys.executable, "-m", "components.step", "components.register.gate", *flags, "--answer", str(answer)]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
        return bool(json.loads(answer.read_bytes()))


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.register.gate", __doc__)
    flags.add_argument("--params", required=True, help="params.yaml, or its section 'register' as JSON")
    flags.add_argument("--shards", required=True, metavar="DIR", help="in: the shard stage's output")
    flags.add_argument("--predictions", required=True, metavar="DIR", help="in: the evaluate stage's output")
    flags.add_argument("--evaluation", required=True, metavar="FILE", help="in: the evaluate stage's metrics")
    flags.add_argument("--answer", required=True, metavar="FILE", help="out: true or false; reasons go to the log")
    add_replace_champion(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from components.register.verdict import outcome
    from vgg.params import load
    from vgg.params.register import RegisterParams

    params = load(args.params, "register", RegisterParams)
    verdict = check(params, args)
    for reason in verdict.failures():
        program.log.warning("gate failed: %s", reason)
    program.log.info("%s", outcome(verdict))
    manifest.write_json(Path(args.answer), verdict.registrable)


def check(params: RegisterParams, args: argparse.Namespace) -> Verdict:
    """Judge a model and track the verdict in MLflow.

    The value of --answer distinguishes this check from the same check in another run.
    """
    from components.register import registry
    from components.register.compare import Judge
    from components.register.verdict import write
    from components.register.version.package import open_predictions
    from components.tracking import provenance
    from components.tracking.tracker import Tracker, journal_key
    from runtime.store import storage
    from runtime.store.place import downloaded

    evaluation = registry.read_evaluation(Path(args.evaluation))
    opened = storage.open_shards(args.shards)
    storage.expect(args.shards, opened.digest)
    folder = downloaded(args.predictions)
    predictions, content = open_predictions(folder)
    digest = manifest.directory_digest(folder, content)
    storage.expect(args.predictions, digest)
    inputs = {"shards": opened.digest, "predictions": digest, "weights_sha256": evaluation["weights_sha256"]}
    identity = {"gate": params.model_dump(), "evaluation": evaluation, "replace": args.replace_champion}
    key, work = journal_key(identity, args.answer), manifest.digest_of(identity)
    with Tracker("gate", key, provenance.lineage(args.params), work) as tracker:
        tracker.tags(provenance.tags(provenance.record("register", params.model_dump(), inputs)))
        with registry.open_registry(params.model_name) as models:
            judge = Judge(params.gate, models, opened, evaluation, predictions, args.replace_champion)
            verdict = judge(models.state(args.replace_champion))
        with tempfile.TemporaryDirectory() as scratch:
            for path in write(Path(scratch), params.model_name, verdict, judge.challenger, judge.champion):
                tracker.artifact(path, "gate")
        tracker.tags({"vgg.gate": "; ".join(verdict.failures()) or "passed"}, to="both")
    return verdict


if __name__ == "__main__":
    program.run(main)
