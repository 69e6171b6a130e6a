"""Stage 4 of 4: gate against the champion → package → serving check → a model version with its whole lineage.

Refused with exit 78 and the reasons if the gate does not open; then no version is made.  The same weights registered
again give the same version.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

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
    program.add_executor_input(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    program.expect_one_process("components.register")
    from vgg.params import load
    from vgg.params.register import RegisterParams

    params = load(args.params, "register", RegisterParams)
    from components import closure, mirror, provenance, storage, tracking
    from components.register import registry
    from components.register.gate import reasons_against
    from components.register.package import Package
    from vgg import manifest
    from vgg.errors import Refused

    evaluation = registry.read_evaluation(Path(args.evaluation))
    package = Package.open(
        storage.open_shards(args.shards), mirror.fetched(args.checkpoint), mirror.fetched(args.predictions), evaluation
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
        tracking.Tracker("register", tracking.key(identity, args.metrics), provenance.lineage(args.params)) as tracker,
        registry.open_registry(params.model_name) as models,
    ):
        tracker.params({"register": params.model_dump()})
        tracker.tags(provenance.tags(record))
        champion = models.champion()
        reasons = reasons_against(params, evaluation, package.shards, champion)
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
    program.write_executor_output(
        args.executor_output, {"model": metrics["uri"]}, {"metrics": (args.metrics, program.numbers(metrics))}
    )
    program.log.info(
        "%s version %s is champion%s",
        params.model_name,
        version,
        "" if is_new else " (these weights were registered before)",
    )


if __name__ == "__main__":
    program.run(main)
