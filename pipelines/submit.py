"""Compile the pipeline, or submit it to Kubeflow Pipelines.

python -m pipelines.submit --compile build/vgg-imagenet.yaml
python -m pipelines.submit --host http://localhost:8888 -C images=/store/imagenet -C gpus=8 -S train.epochs=1 --wait
python -m pipelines.submit --host http://localhost:8888 resume RUN_ID --wait

Everything the run needs is checked first (--preflight: only check).  If the same run is already active, no other one is
started.  Exit code with --wait: 0 (succeeded), 75 (canceled), that of the task that failed, or 1.
Credentials: KF_PIPELINES_TOKEN or --token-file, KF_PIPELINES_COOKIES, or a pod's token (pipelines/kfp/access.py).
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import given
from components.program import Parser, run
from pipelines.arguments import IMAGES_VERSION, digest, gather, now, sections, unversioned_images
from pipelines.definition.package import NAME, Package, compile_package, compiled, version_name
from pipelines.kfp.access import Access
from runtime import environment
from runtime.errors import Preempted, Problem, WrongParameters

if TYPE_CHECKING:
    from pipelines.kfp.runs import Pipelines
    from pipelines.preflight.checks import Preflight
    from pipelines.preflight.cluster import Cluster

__all__ = ["compile_package", "main", "parser", "sections"]

log = logging.getLogger("vgg.submit")

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def parser() -> argparse.ArgumentParser:
    flags = Parser("pipelines.submit", __doc__)
    flags.add_argument("command", nargs="*", metavar="resume RUN_ID | wait RUN_ID", help="for an existing run")
    what = flags.add_argument_group("what to run")
    what.add_argument("--params", default="params.yaml", metavar="FILE", help="hyperparameters (params.yaml)")
    what.add_argument(
        "-S", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a parameter"
    )
    what.add_argument(
        "-C", dest="settings", action="append", default=[], metavar="NAME=VALUE",
        help="set a run argument; VALUE is YAML\nimages: source folder, as the steps see it\n" + given.described(),
    )  # fmt: skip
    what.add_argument("--experiment", default=NAME, metavar="NAME", help=f"Kubeflow experiment ({NAME})")
    what.add_argument("--version", metavar="NAME", help="name of the uploaded version (the commit)")
    what.add_argument("--again", action="store_true", help="start a run even if the same run is active")
    what.add_argument("--recurring", metavar="CRON", help='start runs on a schedule: "SEC MIN HOUR DAY MONTH WEEKDAY"')
    where = flags.add_argument_group("where to run")
    where.add_argument("--host", metavar="URL", help="Kubeflow Pipelines' API ($KF_PIPELINES_ENDPOINT)")
    where.add_argument("--ui-host", metavar="URL", help="its UI, for links (same as --host)")
    where.add_argument("--token-file", metavar="FILE", help="file with a bearer token")
    where.add_argument("--namespace", metavar="NS", help="namespace of the runs (kubeflow; with profiles, yours)")
    where.add_argument("--service-account", metavar="NAME", help="service account of the pods (Kubeflow's default)")
    where.add_argument("--kube-context", metavar="NAME", help="kubeconfig context, for the preflight")
    where.add_argument("--local", action="store_true", help="run on this machine, in containers")
    where.add_argument("--compile", metavar="FILE", help="do not run: write the package to FILE")
    checks = flags.add_argument_group("checks and waiting")
    checks.add_argument("--preflight", action="store_true", help="check only, create nothing; exit code 0 or 78")
    checks.add_argument("--no-image-check", action="store_true", help="images are already loaded into the nodes")
    checks.add_argument("--no-gpu-check", action="store_true", help="nodes with GPUs are created on demand")
    checks.add_argument("--wait", action="store_true", help="wait until the run ends")
    checks.add_argument("--poll", type=float, default=10.0, metavar="S", help="seconds between two queries (10)")
    checks.add_argument(
        "--patience", type=float, default=600.0, metavar="S", help="give up after S seconds without an answer (600)"
    )
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
        continue_run(args, *args.command)
    else:
        parser().error(f"{' '.join(args.command)}: write resume RUN_ID or wait RUN_ID, or no command")


def submit(args: argparse.Namespace) -> None:
    """Check, upload, start, and print links."""
    check_flags(args)
    access = Access(args.host, args.token_file)
    package = compiled()
    arguments = gather(package, args.params, args.overrides, args.settings)
    pipelines = connect(args, access)
    checks = preflight(args, package, arguments)
    if args.preflight:
        print(*checks.findings, sep="\n")
    checks.refuse_missing()
    if args.preflight:
        print("preflight: nothing is missing")
        return
    start(args, pipelines, package, arguments, (checks.addresses or {}).get("MLFLOW_TRACKING_URI", ""))


def connect(args: argparse.Namespace, access: Access) -> Pipelines:
    """Raises Unreachable and Refused as Server.greet does, WrongParameters if --namespace is required."""
    from pipelines.kfp.runs import Pipelines
    from pipelines.kfp.server import Server

    server = Server(access, args.patience)
    server.greet()
    if not args.namespace and server.multi_user and POD_NAMESPACE.exists():
        args.namespace = POD_NAMESPACE.read_text(encoding="utf-8").strip()
    if not args.namespace and server.multi_user:
        raise WrongParameters(f"{server.host}: every user has a namespace; give yours: --namespace NS")
    args.namespace, args.host = args.namespace or "kubeflow", server.host
    return Pipelines(server, args.namespace)


def preflight(args: argparse.Namespace, package: Package, arguments: dict[str, Any]) -> Preflight:
    """Check everything the run needs; image arguments are replaced by references with digests."""
    from pipelines.preflight.checks import NOTE, UNKNOWN, Preflight

    checks = Preflight(package, {**package.defaults, **arguments})
    if args.no_image_check:
        checks.add("images", UNKNOWN, "--no-image-check; the nodes must have them under their tags")
    else:
        arguments |= checks.images()
    try:
        checks.cluster(kubernetes(args.namespace, args.kube_context), gpus=not args.no_gpu_check)
    except Problem as reason:
        checks.add("ConfigMap, Secrets, volume claim, store, runtime, GPUs", UNKNOWN, str(reason))
    if not args.preflight:
        for finding in checks.findings:
            if finding.state in (NOTE, UNKNOWN):
                log.warning("%s", finding)
    return checks


def kubernetes(namespace: str, context: str | None) -> Cluster:
    """Raises Unreachable without access."""
    from pipelines.preflight.cluster import Cluster

    return Cluster(namespace, context)


def start(
    args: argparse.Namespace,
    pipelines: Pipelines,
    package: Package,
    arguments: dict[str, Any],
    tracking_uri: str,
) -> None:
    """Upload the package and start the run, unless they exist already."""
    from pipelines.kfp import links
    from pipelines.kfp.runs import Order

    identity, version = digest(package, arguments), args.version or version_name(package)
    if unversioned_images(package, arguments) and args.recurring:
        # all its runs have the same arguments, so sharding would always be taken from the cache after the first
        package, version = package.uncached(IMAGES_VERSION), f"{version}-recurring"
        log.info("version %s: sharding never uses the cache, so that it sees new images", version)
    elif unversioned_images(package, arguments):
        arguments[IMAGES_VERSION] = now()
        log.info("%s=%s: not set, so sharding reads the images again", IMAGES_VERSION, arguments[IMAGES_VERSION])
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
    print_links(args, started, tracking_uri)
    if args.wait:
        wait(args, pipelines, started.run_id)


def continue_run(args: argparse.Namespace, command: str, run_id: str) -> None:
    """resume: run the failed tasks again.  wait: only wait."""
    pipelines = connect(args, Access(args.host, args.token_file))
    found = pipelines.resume(run_id) if command == "resume" else pipelines.get(run_id)
    print_links(args, found, "")
    if args.wait or command == "wait":
        wait(args, pipelines, run_id)


def wait(args: argparse.Namespace, pipelines: Pipelines, run_id: str) -> None:
    """Wait until the run ends.  Raises RunFailed, or Preempted if it was canceled."""
    from pipelines.kfp import failure, waiting
    from pipelines.kfp.pending import Pending

    cluster = functools.cache(lambda: kubernetes(args.namespace, args.kube_context))
    log.info("waiting; to wait again later: python -m pipelines.submit --host %s wait %s", args.host, run_id)
    ended, canceled = waiting.wait(pipelines, run_id, args.poll, Pending(cluster, run_id))
    workflow = failure.workflow_of(pipelines.server, run_id) if ended.state == "FAILED" else {}
    if canceled or failure.was_terminated(workflow):
        raise Preempted(f"run {ended.display_name} was canceled; to continue: resume {run_id}")
    if ended.state == "FAILED":
        raise failure.explain(pipelines.server, ended, workflow, cluster)
    print(f"run {ended.display_name} {ended.state}")


def print_links(args: argparse.Namespace, started: Any, tracking_uri: str) -> None:
    from pipelines.kfp import links

    print(f"run:      {started.run_id}")
    print(f"Kubeflow: {links.kubeflow(ui(args), 'runs', started.run_id)}")
    if address := links.mlflow(started, tracking_uri):
        print(f"MLflow:   {address}")


def ui(args: argparse.Namespace) -> str:
    return str(args.ui_host or environment.PIPELINES_UI_ENDPOINT.get() or args.host).rstrip("/")


def check_flags(args: argparse.Namespace) -> None:
    """Raises WrongParameters for values that Kubeflow would reject or misread."""
    if args.version and not re.fullmatch(r"[\w.-]{1,100}", args.version):
        raise WrongParameters(f"--version {args.version!r}: letters, digits, '.', '_' and '-' only")
    if args.recurring and args.wait:
        raise WrongParameters("--recurring starts no run now, so there is nothing to --wait for")
    fields = (args.recurring or "").split()
    if fields and not args.recurring.startswith("@") and len(fields) != 6:
        hint = f' Perhaps "0 {args.recurring}".' if len(fields) == 5 else ""
        raise WrongParameters(
            f"--recurring {args.recurring!r}: Kubeflow's cron has six fields, and the first is seconds.{hint}"
        )


if __name__ == "__main__":
    run(main)
