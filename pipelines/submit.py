"""Compile the pipeline, or submit it to Kubeflow Pipelines.

python -m pipelines.submit --compile build/vgg-imagenet.yaml
python -m pipelines.submit --arguments recipes/imagenet-a-256.yaml -C images=/store/imagenet -C gpus=8
python -m pipelines.submit --host http://localhost:8888 -C images=/store/imagenet -C gpus=8 -S train.epochs=1 --wait
python -m pipelines.submit --host http://localhost:8888 logs RUN train

Everything the run needs is checked first (--preflight: only check).  If the same run is already active, no other one is
started.  Exit code with --wait: 0 (succeeded), 75 (canceled), that of the task that failed, or 1.
Credentials: KF_PIPELINES_TOKEN or --token-file, KF_PIPELINES_COOKIES, or a pod's token (pipelines/kfp/access.py).
From Python, in a notebook: pipelines.submit.Kubeflow.
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.program import run
from pipelines import existing, flags
from pipelines.arguments import (
    IMAGES_VERSION,
    digest,
    for_the_page,
    gather,
    localised,
    now,
    run_name,
    sections,
    unversioned_images,
)
from pipelines.definition.package import Package, compile_package, compiled, version_name
from pipelines.kfp.access import Access
from pipelines.notebook import Kubeflow
from runtime import environment
from runtime.errors import Preempted, Problem, WrongParameters

if TYPE_CHECKING:
    from pipelines.kfp.runs import Pipelines
    from pipelines.preflight.checks import Preflight
    from pipelines.preflight.cluster import Cluster

__all__ = ["Kubeflow", "compile_package", "main", "parser", "sections"]

log = logging.getLogger("vgg.submit")

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def parser() -> argparse.ArgumentParser:
    return flags.parser(__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.compile:
        compile_package(Path(args.compile), localised(args.params, args.overrides))
        print(args.compile)
    elif args.local:
        from pipelines.local import run as run_here

        package = compiled(localised(args.params, args.overrides))
        run_here(gather(package, args.params, args.overrides, args.settings))
    elif args.arguments is not None:
        recipe = args.arguments or args.params
        package = compiled(localised(recipe, args.overrides))
        print(for_the_page(gather(package, recipe, args.overrides, args.settings)))
    elif not args.command:
        submit(args)
    elif not flags.complete(args.command):
        parser().error(f"{' '.join(args.command)}: write no command, or one of\n{flags.HELP}")
    elif args.command[0] in ("resume", "wait"):
        continue_run(args, *args.command)
    else:
        show(args, *args.command)


def show(args: argparse.Namespace, command: str, name: str = "", step: str | None = None) -> None:
    """list, logs, and cancel."""
    pipelines, cluster = connect(args, Access(args.host, args.token_file)), access_to_pods(args)
    if command == "list":
        existing.print_list(pipelines, args.experiment)
        return
    from pipelines.kfp import find

    run_id = find.run_id(pipelines, name)
    if command == "logs":
        existing.print_logs(pipelines, run_id, step, cluster)
    else:
        existing.cancel(pipelines, run_id, args.poll, cluster)


def submit(args: argparse.Namespace) -> str:
    """Check, upload, start, and print links.  Returns the run's id; '' with --preflight or --recurring."""
    check_flags(args)
    access = Access(args.host, args.token_file)
    package = compiled(localised(args.params, args.overrides))
    arguments = gather(package, args.params, args.overrides, args.settings)
    pipelines = connect(args, access)
    checks = preflight(args, package, arguments)
    if args.preflight:
        print(*checks.findings, sep="\n")
    checks.refuse_missing()
    if args.preflight:
        print("preflight: nothing is missing")
        return ""
    return start(args, pipelines, package, arguments, (checks.addresses or {}).get("MLFLOW_TRACKING_URI", ""))


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


def access_to_pods(args: argparse.Namespace) -> Callable[[], Cluster]:
    """Connects when it is first called; raises Unreachable without access."""
    return functools.cache(lambda: kubernetes(args.namespace, args.kube_context))


def start(
    args: argparse.Namespace,
    pipelines: Pipelines,
    package: Package,
    arguments: dict[str, Any],
    tracking_uri: str,
) -> str:
    """Upload the package and start the run, unless they exist already.  Returns its id; '' with --recurring."""
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
        name=run_name(package, arguments, version, identity),
        experiment=pipelines.experiment(args.experiment),
        version=pipelines.version(package, version),
        arguments=arguments,
        account=args.service_account,
    )
    if args.recurring:
        print(f"Kubeflow: {links.kubeflow(ui(args), 'recurringrun', pipelines.recurring(order, args.recurring))}")
        return ""
    started = pipelines.run(order, args.again)
    print_links(args, started, tracking_uri)
    if args.wait:
        wait(args, pipelines, started.run_id)
    return str(started.run_id)


def continue_run(args: argparse.Namespace, command: str, run_id: str) -> None:
    """resume: run the failed tasks again.  wait: only wait.  run_id: or the beginning of it, or a name."""
    from pipelines.kfp import find

    pipelines = connect(args, Access(args.host, args.token_file))
    run_id = find.run_id(pipelines, run_id)
    found = pipelines.resume(run_id) if command == "resume" else pipelines.get(run_id)
    print_links(args, found, "")
    if args.wait or command == "wait":
        wait(args, pipelines, run_id)


def wait(args: argparse.Namespace, pipelines: Pipelines, run_id: str) -> None:
    """Wait until the run ends.  Raises RunFailed, or Preempted if it was canceled."""
    from pipelines.kfp import failure, waiting
    from pipelines.kfp.pending import Pending

    cluster = access_to_pods(args)
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
