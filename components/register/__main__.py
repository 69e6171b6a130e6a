"""Stage 4 of 4: gate against the champion → package → serving check → a model version with its whole lineage.

If the gate fails, no version is registered: the program reports the reasons and exits with 78.  Registering the same
weights again returns the existing version.
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
    from components.register import registry
    from components.register.gate import rejection_reasons
    from components.register.package import Package
    from components.stage import Stage
    from runtime.errors import Refused
    from runtime.store.place import downloaded
    from vgg.params.register import RegisterParams

    stage = Stage("register", args, RegisterParams)
    evaluation = registry.read_evaluation(Path(args.evaluation))
    package = Package.open(stage.open_shards(), downloaded(args.checkpoint), downloaded(args.predictions), evaluation)
    stage.expect("checkpoint", args.checkpoint, package.trained.digest)
    stage.expect("predictions", args.predictions, package.predictions_digest)
    stage.inputs["weights_sha256"] = package.trained.weights_sha256
    name = stage.params.model_name
    with stage.tracked(args.metrics) as tracker, registry.open_registry(name) as models:
        champion = models.champion()
        reasons = rejection_reasons(stage.params, evaluation, package.shards, champion)
        tracker.tags({"vgg.gate": "; ".join(reasons) or "passed"}, to="both")
        if reasons:
            listing = "\n".join(f"  {reason}" for reason in reasons)
            raise Refused(f"{name}: gate failed; no version registered:\n{listing}")
        version, is_new = models.register(package, stage.record, tracker)
        models.promote(version, champion)
        metrics = {
            "model_name": name,
            "version": int(version),
            "uri": f"models:/{name}@champion",
            "weights_sha256": package.trained.weights_sha256,
            "top1_error": evaluation["top1_error"],
            "top5_error": evaluation["top5_error"],
        }
        tracker.tags({"vgg.model": f"{name}/{version}"}, to="both")
        stage.finish(metrics, {"model": metrics["uri"]})
    program.log.info(
        "%s version %s is champion%s", name, version, "" if is_new else " (these weights were registered before)"
    )


if __name__ == "__main__":
    program.run(main)
