"""The gate as a separate step, so that the register step starts only for a model that passes."""

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
from components.register import registry
from components.register.champion import Champion
from components.tracking import provenance
from components.tracking.tracker import Tracker, journal_key
from runtime import manifest
from runtime.store import storage
from vgg.evaluation import gate
from vgg.params import load
from vgg.params.register import RegisterParams

if TYPE_CHECKING:
    from runtime.shards.shardset import ShardSet


def rejection_reasons(
    params: RegisterParams, evaluation: dict[str, Any], shards: ShardSet, champion: Champion | None
) -> list[str]:
    """Why a model must not be registered; empty if it passes the gate or is the champion itself."""
    if champion and champion.weights_sha256 == evaluation["weights_sha256"]:
        return []
    return gate.failures(params.gate, evaluation, len(shards.split("val")), champion.evaluation if champion else None)


def gate_passes(section: dict[str, Any], shards: str, evaluation: str) -> bool:
    """Run this program under components.step, with its retries; returns whether the gate passes.

    section: register of params.yaml.  shards: their address.  evaluation: file of the evaluate stage's metrics.
    Exits with the program's code if the program fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        flags = ["--params", json.dumps(section), "--shards", shards, "--evaluation", evaluation]
        command = [sys.executable, "-m", "components.step", "components.register.gate", *flags, "--answer", str(answer)]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
        return bool(json.loads(answer.read_bytes()))


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.register.gate", __doc__)
    flags.add_argument("--params", required=True, help="params.yaml, or its section 'register' as JSON")
    flags.add_argument("--shards", required=True, metavar="DIR", help="in: the shard stage's output")
    flags.add_argument("--evaluation", required=True, metavar="FILE", help="in: the evaluate stage's metrics")
    flags.add_argument("--answer", required=True, metavar="FILE", help="out: true or false; reasons go to the log")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    params = load(args.params, "register", RegisterParams)
    reasons = check(params, args.params, args.shards, Path(args.evaluation), args.answer)
    for reason in reasons:
        program.log.warning("gate failed: %s", reason)
    if not reasons:
        program.log.info("gate passed")
    manifest.write_json(Path(args.answer), not reasons)


def check(params: RegisterParams, source: str, shards: str, path: Path, answer: str) -> list[str]:
    """Check a model against the gate and track the result in MLflow; returns the rejection reasons.

    answer: value of --answer; it distinguishes this check from the same check in another run.
    """
    evaluation = registry.read_evaluation(path)
    opened = storage.open_shards(shards)
    storage.expect(shards, opened.digest)
    inputs = {"shards": opened.digest, "weights_sha256": evaluation["weights_sha256"]}
    identity = {"gate": params.model_dump(), "evaluation": evaluation}
    key, work = journal_key(identity, answer), manifest.digest_of(identity)
    with Tracker("gate", key, provenance.lineage(source), work) as tracker:
        tracker.tags(provenance.tags(provenance.record("register", params.model_dump(), inputs)))
        with registry.open_registry(params.model_name) as models:
            reasons = rejection_reasons(params, evaluation, opened, models.champion())
        tracker.tags({"vgg.gate": "; ".join(reasons) or "passed"}, to="both")
    return reasons


if __name__ == "__main__":
    program.run(main)
