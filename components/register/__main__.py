"""Stage 4 of 4: gate against the champion → package → serving check → a model version with its whole lineage.

Refused with exit 78 and the reasons if the gate does not open; then no version is made.  The same weights registered
again give the same version.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components import program


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("register", __doc__)
    flags.add_argument("--shards", required=True, metavar="DIR", help="in: the shard stage's output")
    flags.add_argument("--checkpoint", required=True, metavar="DIR", help="in: the train stage's output")
    flags.add_argument("--predictions", required=True, metavar="DIR", help="in: the evaluate stage's output")
    flags.add_argument("--evaluation", required=True, metavar="FILE", help="in: the evaluate stage's metrics")
    flags.add_argument(
        "--metrics", required=True, metavar="FILE", help="out: name, version and aliases, JSON; written last"
    )
    program.add_executor_output(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from vgg.params import load
    from vgg.params.register import RegisterParams

    params = load(args.params, "register", RegisterParams)
    from components import closure, provenance, storage, tracking
    from components.register import registry
    from components.register.package import Package
    from vgg import manifest
    from vgg.errors import Refused
    from vgg.gate import failures

    evaluation = read_evaluation(Path(args.evaluation))
    package = Package.open(
        storage.open_shards(args.shards), storage.locate(args.checkpoint), storage.locate(args.predictions), evaluation
    )
    for argument, digest in (
        (args.shards, package.shards.digest),
        (args.checkpoint, package.trained.digest),
        (args.predictions, package.predictions_digest),
    ):
        storage.expect(argument, digest)
    inputs = {
        "shards": package.shards.digest,
        "checkpoint": package.trained.digest,
        "predictions": package.predictions_digest,
        "weights_sha256": package.trained.weights_sha256,
    }
    record = provenance.record("register", params.model_dump(), inputs)
    identity = {"register": params.model_dump(), "code": closure.fingerprints("register"), **inputs}
    with (
        tracking.Tracker("register", manifest.digest_of(identity), provenance.lineage(args.params)) as tracker,
        registry.open_registry(params.model_name) as models,
    ):
        tracker.params({"register": params.model_dump()})
        tracker.tags(provenance.tags(record))
        champion = models.champion()
        expected = len(package.shards.split("val"))
        reasons = failures(params.gate, evaluation, expected, champion.evaluation if champion else None)
        if champion and champion.weights_sha256 == package.trained.weights_sha256:
            reasons = []  # it is the champion already
        tracker.tags({"vgg.gate": "; ".join(reasons) or "passed"}, to="both")
        if reasons:
            listing = "\n".join(f"  {reason}" for reason in reasons)
            raise Refused(f"{params.model_name}: the gate does not open; no version was made:\n{listing}")
        version, is_new = models.register(package, record, tracker)
        models.promote(version, champion)
        metrics = {
            "model_name": params.model_name,
            "version": int(version),
            "uri": f"models:/{params.model_name}@champion",
            "weights_sha256": package.trained.weights_sha256,
            "top1_error": evaluation["top1_error"],
            "top5_error": evaluation["top5_error"],
        }
        tracker.tags({"vgg.model": f"{params.model_name}/{version}"}, to="both")
        manifest.write_json(Path(args.metrics), metrics)
    program.write_executor_output(args.executor_output, {"model": metrics["uri"]}, metrics, Path(args.metrics))
    program.log.info(
        "%s version %s is champion%s",
        params.model_name,
        version,
        "" if is_new else " (these weights were registered before)",
    )


def read_evaluation(path: Path) -> dict[str, Any]:
    from vgg.errors import Refused

    try:
        found = json.loads(path.read_bytes())
        needed = {"headline", "modes", "top1_error", "top5_error", "num_images", "weights_sha256", "data_digest"}
        missing = needed - found.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise Refused(f"{path}: no evaluation can be read from it: {error}. Run the evaluate stage.") from None
    if missing:
        raise Refused(f"{path}: lacks {', '.join(sorted(missing))}. Run the evaluate stage.")
    return dict(found)


if __name__ == "__main__":
    program.run(main)
