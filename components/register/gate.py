"""The gate by itself, as a step before registration: what register would refuse is not even begun."""

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
from components.tracking import provenance
from components.tracking.tracker import Tracker, journal_key
from runtime import manifest
from runtime.store import storage
from vgg.evaluation import gate
from vgg.params import load
from vgg.params.register import RegisterParams

if TYPE_CHECKING:
    from runtime.shardset import ShardSet


def reasons_against(
    params: RegisterParams, evaluation: dict[str, Any], shards: ShardSet, champion: registry.Champion | None
) -> list[str]:
    """Why a model must not be registered; empty for one that may, and for the champion itself."""
    if champion and champion.weights_sha256 == evaluation["weights_sha256"]:
        return []
    return gate.failures(params.gate, evaluation, len(shards.split("val")), champion.evaluation if champion else None)


def opens(section: dict[str, Any], shards: str, evaluation: str) -> bool:
    """Whether the gate opens, found out by this program as a step: run again where that may help.

    section: of params.yaml.  shards: their address.  evaluation: file of the evaluate stage's metrics.
    Exits with the program's code if it cannot be told.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        words = ["--params", json.dumps(section), "--shards", shards, "--evaluation", evaluation, "--answer", answer]
        command = [sys.executable, "-m", "components.step", "components.register.gate", *map(str, words)]
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
    reasons = ask(params, args.params, args.shards, Path(args.evaluation), args.answer)
    for reason in reasons:
        program.log.warning("gate failed: %s", reason)
    if not reasons:
        program.log.info("gate passed")
    manifest.write_json(Path(args.answer), not reasons)


def ask(params: RegisterParams, source: str, shards: str, path: Path, answer: str) -> list[str]:
    """Reasons against, which are written to the runs in MLflow too.

    answer: where they are asked for; what makes this question another than the same one of another run.
    """
    found = registry.read_evaluation(path)
    opened = storage.open_shards(shards)
    storage.expect(shards, opened.digest)
    inputs = {"shards": opened.digest, "weights_sha256": found["weights_sha256"]}
    identity = {"gate": params.model_dump(), "evaluation": found}
    with Tracker("gate", journal_key(identity, answer), provenance.lineage(source)) as tracker:
        tracker.tags(provenance.tags(provenance.record("register", params.model_dump(), inputs)))
        with registry.open_registry(params.model_name) as models:
            reasons = reasons_against(params, found, opened, models.champion())
        tracker.tags({"vgg.gate": "; ".join(reasons) or "passed"}, to="both")
    return reasons


if __name__ == "__main__":
    program.run(main)
