"""Build the images of the steps under their content tags: python -m pipelines.build [--push]

Stages with the same target share one build.  An existing tag is not built or pushed again: its content cannot have
changed.  VGG_REGISTRY sets the registry (default localhost).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from components.closure import ROOT
from components.images import TARGETS, listing, reference
from components.program import Parser, run
from components.tracking import provenance
from pipelines.preflight.registry import Registries
from runtime.errors import Refused, Unreachable, WrongParameters

log = logging.getLogger("vgg.build")

PYTHON = "docker.io/library/python:3.11-slim-bookworm"
SITE_PACKAGES = "/opt/vgg/lib/python3.11/site-packages"
LARGEST = 8  # packages listed per image


def parser() -> argparse.ArgumentParser:
    flags = Parser("pipelines.build", __doc__)
    flags.add_argument("--engine", choices=("docker", "podman"), help="default: the one that works")
    flags.add_argument(
        "--base", metavar="IMAGE", help=f"base image: CPython 3.11 on Debian, by digest (default: current {PYTHON})"
    )
    flags.add_argument("--ca", metavar="FILE", help="CA certificates of a private network; used during the build only")
    flags.add_argument("--push", action="store_true", help="then push images that the registry does not have")
    flags.add_argument("--print-tags", action="store_true", help="only print the references, one line per stage")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.print_tags:
        print(listing())
        return
    references = {stage: reference(stage) for stage in TARGETS}
    engine = args.engine or find_engine()
    missing = {stage: name for stage, name in references.items() if not present(engine, name)}
    base = (args.base or pulled(engine, PYTHON)) if missing else ""
    for target in dict.fromkeys(TARGETS[stage] for stage in missing):
        build(engine, target, base, args.ca, [name for stage, name in missing.items() if TARGETS[stage] == target])
    for target in dict.fromkeys(TARGETS.values()):
        print(contents(engine, next(name for stage, name in references.items() if TARGETS[stage] == target)))
    if args.push:
        for name in references.values():
            push(engine, name)


def find_engine() -> str:
    """Raises Unreachable if neither Docker nor podman works."""
    for engine in ("docker", "podman"):
        if shutil.which(engine) and subprocess.run([engine, "info"], capture_output=True, timeout=60).returncode == 0:
            return engine
    raise Unreachable("neither docker nor podman works; install one, or start its service")


def present(engine: str, name: str) -> bool:
    return subprocess.run([engine, "image", "inspect", name], capture_output=True, timeout=60).returncode == 0


def pulled(engine: str, name: str) -> str:
    """Pull the image and return its reference by digest.  Raises Unreachable if the pull fails."""
    done = subprocess.run(
        [engine, "pull", "--quiet", name],
        capture_output=True,
        timeout=1800,
        encoding="utf-8",
        errors="backslashreplace",
    )
    if done.returncode:
        raise Unreachable(f"{name} cannot be pulled: {done.stderr.strip()}\nName another base with --base IMAGE.")
    return str(json.loads(output(engine, "image", "inspect", name))[0]["RepoDigests"][0])


def build(engine: str, target: str, base: str, ca: str | None, names: list[str]) -> None:
    """One build with several tags.  Raises WrongParameters for a missing file, Refused if the build fails."""
    command = [engine, "build", "--file", "docker/Dockerfile", "--target", target, "--build-arg", f"BASE={base}"]
    command += ["--build-arg", f"GIT_COMMIT={commit()}"]
    if ca:
        if not Path(ca).is_file():
            raise WrongParameters(f"--ca {ca}: no such file")
        command += ["--secret", f"id=ca,src={ca}"]
    for name in names:
        command += ["--tag", name]
    log.info("%s: %s", target, ", ".join(names))
    done = subprocess.run(
        [*command, "."], cwd=ROOT, env={**os.environ, "DOCKER_BUILDKIT": "1"}, stdout=sys.stderr, timeout=7200
    )
    if done.returncode:
        raise Refused(f"target {target} does not build; see the output above")


def commit() -> str:
    """Of the work tree, with the suffix '-dirty' if it has changes; '' if git does not say (a warning says why)."""
    found = provenance.git()
    return f"{found['commit'] or ''}{'-dirty' if found['dirty'] else ''}"


def contents(engine: str, name: str) -> str:
    """Size of an image and of its largest packages, in megabytes."""
    size = int(json.loads(output(engine, "image", "inspect", name))[0]["Size"])
    listed = output(
        engine, "run", "--rm", "--network=none", name, "du", "--block-size=1000000", "--max-depth=1", SITE_PACKAGES
    )
    rows = sorted(((int(line.split("\t")[0]), Path(line.split("\t")[1])) for line in listed.splitlines()), reverse=True)
    largest = ", ".join(f"{path.name} {megabytes:,}" for megabytes, path in rows[1 : LARGEST + 1])
    return f"{name}: {size / 1e6:,.0f} MB, including Python packages {rows[0][0]:,} ({largest})"


def push(engine: str, name: str) -> str:
    """Push an image if the registry does not have its tag (which has the same content); returns it by digest.

    Raises Unreachable if the registry does not answer or the push fails.
    """
    registries = Registries()
    try:
        found = registries.pinned(name)
        log.info("exists: %s", found)
        return found
    except Refused:
        pass
    done = subprocess.run([engine, "push", name], stdout=sys.stderr, timeout=7200)
    if done.returncode:
        raise Unreachable(f"{name} could not be pushed; log in with: {engine} login {name.partition('/')[0]}")
    found = registries.pinned(name)
    log.info("pushed: %s", found)
    return found


def output(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, timeout=300, encoding="utf-8", errors="backslashreplace"
    ).stdout


if __name__ == "__main__":
    run(main)
