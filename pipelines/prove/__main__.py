"""An installation proves itself: the digits on this cluster, and what a careful operator would try.

python -m pipelines.prove                     in about 20 minutes, on small nodes without GPUs
python -m pipelines.prove --only preflight,digits,metrics
python -m pipelines.prove --clean prove-20261128-053000       remove what a killed proof, or one with --keep, has left

Against the cluster of kubectl's context and of $KF_PIPELINES_ENDPOINT, with deploy/ applied and the images pushed
(docs/cluster.md).  It makes there, all named prove-<time>: a ConfigMap with a store of its own (a folder below
VGG_STORE), an experiment with some runs, a version of the pipeline, registered models, and pods that look around.  It
deletes training pods of its own runs.  At the end it removes everything and says what it could not (--keep: it stays).

It prints a table and writes it to --output: prove.md, prove.xml (JUnit).  Exit code 0, or 1 if a check failed, or 75
after an interrupt.  What cannot be tried here (no Trainer, no permission) is "not tried", never "ok".
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from components.program import Parser, run
from pipelines.connection import add_connection, add_image_check, add_pace
from runtime import environment
from runtime.errors import Preempted, Problem, Refused, WrongParameters

if TYPE_CHECKING:
    from pipelines.prove.bench import Bench
    from pipelines.prove.objects import Objects
    from pipelines.prove.report import Report

log = logging.getLogger("vgg.prove")

PREFIX = "prove-"
NEEDED = (("list", "pods"), ("create", "configmaps"), ("delete", "configmaps"))


class NotProved(Problem):
    """A check failed."""

    exit_code = 1


def parser() -> argparse.ArgumentParser:
    flags = Parser("pipelines.prove", __doc__)
    flags.add_argument("--only", metavar="NAME,NAME", help="only these checks (and what they need must be among them)")
    flags.add_argument("--keep", action="store_true", help="remove nothing at the end")
    flags.add_argument("--clean", metavar="NAME", help="only remove what the proof of this name has left")
    flags.add_argument("--output", default="build/prove", metavar="DIR", help="for the table (build/prove)")
    flags.add_argument("--time-factor", type=float, default=1.0, metavar="F", help="times the time limits (1)")
    flags.add_argument(
        "-C", dest="settings", action="append", default=[], metavar="NAME=VALUE",
        help="run argument of all runs, as of pipelines.submit",
    )  # fmt: skip
    add_connection(flags)
    add_image_check(flags)
    add_pace(flags, poll=3, patience=60)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.clean and not args.clean.startswith(PREFIX):
        raise WrongParameters(f"--clean {args.clean}: the name of a proof begins with {PREFIX}")
    from pipelines.prove.table import CHECKS, run_all

    names = args.only.split(",") if args.only else [check.name for check in CHECKS]
    if unknown := set(names) - {check.name for check in CHECKS}:
        known = ", ".join(check.name for check in CHECKS)
        raise WrongParameters(f"--only: no check {', '.join(sorted(unknown))}. The checks: {known}")
    bench = open_bench(args)
    if args.clean:
        clean_up(bench)
        return
    report = opened(bench)
    checks = [check for check in CHECKS if check.name in names]
    interrupted = False
    try:
        run_all(bench, report, checks, args.time_factor)
    except KeyboardInterrupt:
        interrupted = True
        log.warning("interrupted; removing what was made. Once more: leave the rest")
    finish(bench, report, Path(args.output))
    if interrupted:
        raise Preempted("interrupted; what was not tried is in the table")
    if failed := [row.check for row in report.rows if row.state == "failed"]:
        raise NotProved(f"failed: {', '.join(failed)}")


def open_bench(args: argparse.Namespace) -> Bench:
    """Raises WrongParameters, Unreachable and Refused if there is no cluster to try, or nothing may be tried there."""
    if not (args.host or environment.PIPELINES_ENDPOINT.get() or environment.IN_CLUSTER.is_set()):
        raise WrongParameters(
            "set KF_PIPELINES_ENDPOINT (or --host) to the address of Kubeflow Pipelines' API, for example after: "
            "kubectl -n kubeflow port-forward service/ml-pipeline 8888"
        )
    from pipelines import submit
    from pipelines.kfp.access import Access
    from pipelines.prove.bench import Bench
    from pipelines.prove.objects import Objects

    pipelines = submit.connect(args, Access(args.host, args.token_file))
    cluster = Objects(args.namespace, args.kube_context)
    expect_rights(cluster)
    name = args.clean or f"{PREFIX}{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return Bench(args, pipelines, cluster, submit.compiled(), name)


def expect_rights(cluster: Objects) -> None:
    """Raises Refused without the permissions that every check and the removal need."""
    from pipelines.preflight.cluster import NotAllowed

    try:
        missing = [f"{verb} {what}" for verb, what in NEEDED if not cluster.may(verb, what)]
    except NotAllowed as reason:
        raise Refused(f"{reason}. Check kubectl's context: kubectl auth whoami") from None
    if missing:
        raise Refused(
            f"no permission in namespace {cluster.namespace} of {cluster.address} to {', '.join(missing)}. Ask for it, "
            "or choose another context or --namespace. Nothing was made."
        )


def opened(bench: Bench) -> Report:
    from pipelines.prove.report import Report

    about = {
        "Kubeflow Pipelines": f"{bench.pipelines.server.version} at {bench.args.host}",
        "Kubernetes": f"{bench.cluster.version} at {bench.cluster.address}, namespace {bench.cluster.namespace}",
        "package": bench.package.sha256,
        "began": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    log.info("%s: %s", bench.name, "; ".join(f"{what} {value}" for what, value in about.items()))
    return Report(bench.name, about)


def finish(bench: Bench, report: Report, output: Path) -> None:
    """Remove what was made, and print and write the table."""
    from runtime import manifest
    from runtime.redaction import redacted

    if bench.args.keep:
        report.left.append(f"everything (--keep); to remove it: python -m pipelines.prove --clean {bench.name}")
    else:
        report.left += [redacted(one) for one in clean_up(bench)]
    print(report.text())
    for name, content in (("prove.md", report.markdown().encode()), ("prove.xml", report.junit())):
        manifest.write_atomically(output / name, lambda file, content=content: file.write(content))
    print(f"{output}/prove.md, {output}/prove.xml")


def clean_up(bench: Bench) -> list[str]:
    """What could not be removed."""
    from pipelines.prove.cleaning import KNOWN_TO_STAY, Cleaning

    left = Cleaning(bench).run()
    for one in left:
        log.warning("left behind: %s", one)
    log.info("stays in any case: %s", KNOWN_TO_STAY)
    return left


if __name__ == "__main__":
    run(main)
