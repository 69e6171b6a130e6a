"""Compile the pipeline, or submit it to Kubeflow Pipelines.

python -m pipelines.submit --compile build/vgg-imagenet.yaml
python -m pipelines.submit --host http://localhost:8888 -C images=/store/imagenet -C gpus=8 -S train.epochs=1 --wait
python -m pipelines.submit --host http://localhost:8888 resume RUN_ID --wait

Everything that a run needs is looked for first (--preflight: only that).  Submitted twice, the run that is under way is
found.  With --wait the exit code is 0 (succeeded), 75 (canceled), that of the task that failed, or 1.
Who submits: KF_PIPELINES_TOKEN or --token-file, KF_PIPELINES_COOKIES, or a pod's own token (pipelines/access.py).
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.program import Parser, run
from pipelines.access import Access
from pipelines.arguments import FRESH, digest, gather, now, sections, unvouched
from pipelines.package import NAME, Package, compile_package, compiled, version_name
from vgg.errors import Preempted, Problem, WrongParameters

if TYPE_CHECKING:
    from pipelines.cluster import Cluster
    from pipelines.preflight import Preflight
    from pipelines.runs import Pipelines

__all__ = ["compile_package", "main", "parser", "sections"]

log = logging.getLogger("vgg.submit")

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def parser() -> argparse.ArgumentParser:
    flags = Parser("pipelines.submit", __doc__)
    flags.add_argument(
        "command", nargs="*", metavar="resume RUN_ID | wait RUN_ID", help="of a run that is there already"
    )
    what = flags.add_argument_group("what runs")
    what.add_argument("--params", default="params.yaml", metavar="FILE", help="the science (params.yaml)")
    what.add_argument(
        "-S", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a parameter"
    )
    what.add_argument(
        "-C", dest="settings", action="append", default=[], metavar="NAME=VALUE",
        help="set a run argument: images, nodes, gpus, train_memory, tolerations, claim, …; YAML",
    )  # fmt: skip
    what.add_argument("--experiment", default=NAME, metavar="NAME", help=f"Kubeflow's ({NAME})")
    what.add_argument("--version", metavar="NAME", help="what the uploaded package is called (the commit)")
    what.add_argument("--again", action="store_true", help="start a run although the same is under way")
    what.add_argument("--recurring", metavar="CRON", help='start one by the clock: "SEC MIN HOUR DAY MONTH WEEKDAY"')
    where = flags.add_argument_group("where it runs")
    where.add_argument("--host", metavar="URL", help="Kubeflow Pipelines' API ($KF_PIPELINES_ENDPOINT)")
    where.add_argument("--ui-host", metavar="URL", help="its UI, for links (the same)")
    where.add_argument("--token-file", metavar="FILE", help="holds a bearer token")
    where.add_argument("--namespace", metavar="NS", help="of the runs (kubeflow; with profiles your own)")
    where.add_argument("--service-account", metavar="NAME", help="of the pods (Kubeflow's default)")
    where.add_argument("--kube-context", metavar="NAME", help="of kubeconfig, for the preflight")
    where.add_argument("--local", action="store_true", help="on this machine, in containers")
    where.add_argument("--compile", metavar="FILE", help="nowhere: write the package there")
    checks = flags.add_argument_group("checks and waiting")
    checks.add_argument("--preflight", action="store_true", help="check, make nothing; 0 or 78")
    checks.add_argument("--no-image-check", action="store_true", help="images are loaded into the nodes, by their tags")
    checks.add_argument("--no-gpu-check", action="store_true", help="nodes with GPUs are made on demand")
    checks.add_argument("--wait", action="store_true", help="until the run has ended")
    checks.add_argument("--poll", type=float, default=10.0, metavar="S", help="seconds between two looks (10)")
    checks.add_argument("--patience", type=float, default=600.0, metavar="S", help="seconds without an answer (600)")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.compile:
        compile_package(Path(args.compile))
        print(args.compile)
    elif args.local:
        from pipelines.local import run as run_here

        run_here(gather(compiled(), args.params, args.overrides, args.settings))
    elif not args.command:
        submit(args)
    elif args.command[0] in ("resume", "wait") and len(args.command) == 2:
        go_on(args, *args.command)
    else:
        parser().error(f"{' '.join(args.command)}: write resume RUN_ID or wait RUN_ID, or no command")


def submit(args: argparse.Namespace) -> None:
    """Check, upload, start, and say where to look."""
    check_flags(args)
    access = Access(args.host, args.token_file)
    package = compiled()
    arguments = gather(package, args.params, args.overrides, args.settings)
    pipelines = connect(args, access)
    checks = preflight(args, package, arguments)
    if args.preflight:
        print(*checks.findings, sep="\n")
    checks.refuse_lacks()
    if args.preflight:
        print("preflight: nothing is missing")
        return
    start(args, pipelines, package, arguments, (checks.addresses or {}).get("MLFLOW_TRACKING_URI", ""))


def connect(args: argparse.Namespace, access: Access) -> Pipelines:
    """Raises Unreachable and Refused as Server.greet does, WrongParameters if a namespace must be given."""
    from pipelines.runs import Pipelines
    from pipelines.server import Server

    server = Server(access, args.patience)
    server.greet()
    if not args.namespace and server.multi_user and POD_NAMESPACE.exists():
        args.namespace = POD_NAMESPACE.read_text().strip()
    if not args.namespace and server.multi_user:
        raise WrongParameters(f"{server.host}: has a namespace for every user; say yours: --namespace NS")
    args.namespace, args.host = args.namespace or "kubeflow", server.host
    return Pipelines(server, args.namespace)


def preflight(args: argparse.Namespace, package: Package, arguments: dict[str, Any]) -> Preflight:
    """Look for everything that the run needs, and put images by digest into its arguments."""
    from pipelines.preflight import NOTE, UNKNOWN, Preflight

    checks = Preflight(package, {**package.defaults, **arguments})
    if args.no_image_check:
        checks.say("images", UNKNOWN, "--no-image-check; the nodes must have them under their tags")
    else:
        arguments |= checks.images()
    try:
        checks.cluster(kubernetes(args.namespace, args.kube_context), gpus=not args.no_gpu_check)
    except Problem as reason:
        checks.say("ConfigMap, Secrets, volume claim, store, runtime, GPUs", UNKNOWN, str(reason))
    if not args.preflight:
        for finding in checks.findings:
            if finding.state in (NOTE, UNKNOWN):
                log.warning("%s", finding)
    return checks


def kubernetes(namespace: str, context: str | None) -> Cluster:
    """Raises Unreachable where there is no access."""
    from pipelines.cluster import Cluster

    return Cluster(namespace, context)


def start(
    args: argparse.Namespace,
    pipelines: Pipelines,
    package: Package,
    arguments: dict[str, Any],
    tracking_uri: str,
) -> None:
    """Upload the package and start the run, unless both are there."""
    from pipelines import links
    from pipelines.runs import Order

    identity, version = digest(package, arguments), args.version or version_name(package)
    if unvouched(package, arguments) and args.recurring:
        # every run of it has the same arguments, so its sharding would find the first one's result for ever
        package, version = package.uncached(FRESH), f"{version}-recurring"
        log.info("version %s: sharding is never taken from the cache, so that new images are seen", version)
    elif unvouched(package, arguments):
        arguments[FRESH] = now()
        log.info("%s=%s: nobody vouches for the images, so sharding looks at them again", FRESH, arguments[FRESH])
    order = Order(
        name=f"{NAME} {version} {identity[:10]}",
        experiment=pipelines.experiment(args.experiment),
        version=pipelines.version(package, version),
        arguments=arguments,
        account=args.service_account,
    )
    if args.recurring:
        print(f"Kubeflow: {links.kubeflow(ui(args), 'recurringrun', pipelines.recurring(order, args.recurring))}")
        return
    started = pipelines.run(order, args.again)
    tell(args, started, tracking_uri)
    if args.wait:
        wait(args, pipelines, started.run_id)


def go_on(args: argparse.Namespace, command: str, run_id: str) -> None:
    """resume: run what failed again.  wait: only look."""
    pipelines = connect(args, Access(args.host, args.token_file))
    found = pipelines.resume(run_id) if command == "resume" else pipelines.get(run_id)
    tell(args, found, "")
    if args.wait or command == "wait":
        wait(args, pipelines, run_id)


def wait(args: argparse.Namespace, pipelines: Pipelines, run_id: str) -> None:
    """Until the run has ended.  Raises RunFailed, or Preempted if it was canceled."""
    from pipelines import failure, waiting

    log.info("waiting; if this ends before the run: python -m pipelines.submit --host %s wait %s", args.host, run_id)
    ended, canceled = waiting.wait(pipelines, run_id, args.poll)
    workflow = failure.workflow_of(pipelines.server, run_id) if ended.state == "FAILED" else {}
    if canceled or failure.was_terminated(workflow):
        raise Preempted(f"run {ended.display_name} was canceled; to go on: resume {run_id}")
    if ended.state == "FAILED":
        cluster = functools.cache(lambda: kubernetes(args.namespace, args.kube_context))
        raise failure.explain(pipelines.server, ended, workflow, cluster)
    print(f"run {ended.display_name} {ended.state}")


def tell(args: argparse.Namespace, started: Any, tracking_uri: str) -> None:
    from pipelines import links

    print(f"run:      {started.run_id}")
    print(f"Kubeflow: {links.kubeflow(ui(args), 'runs', started.run_id)}")
    if address := links.mlflow(started, tracking_uri):
        print(f"MLflow:   {address}")


def ui(args: argparse.Namespace) -> str:
    return str(args.ui_host or os.environ.get("KF_PIPELINES_UI_ENDPOINT") or args.host).rstrip("/")


def check_flags(args: argparse.Namespace) -> None:
    """Raises WrongParameters for what Kubeflow would not take, or would take for something else."""
    if args.version and not re.fullmatch(r"[\w.-]{1,100}", args.version):
        raise WrongParameters(f"--version {args.version!r}: letters, digits, '.', '_' and '-' only")
    if args.recurring and args.wait:
        raise WrongParameters("--recurring: there is no run to --wait for yet")
    fields = (args.recurring or "").split()
    if fields and not args.recurring.startswith("@") and len(fields) != 6:
        hint = f' You may mean "0 {args.recurring}".' if len(fields) == 5 else ""
        raise WrongParameters(
            f"--recurring {args.recurring!r}: Kubeflow's cron has six fields, the first of them seconds.{hint}"
        )


if __name__ == "__main__":
    run(main)
