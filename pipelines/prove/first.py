"""Checks that make nothing: what is there, and mistakes that must be named before anything is made."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

from pipelines import submit
from pipelines.arguments import gather
from pipelines.preflight.checks import MISSING, NOTE, OK, UNKNOWN, Finding, Preflight
from pipelines.prove.bench import Bench, Different, NotTried
from runtime.errors import Refused, WrongParameters
from runtime.wording import some


def preflight(bench: Bench) -> str:
    """Also finds the images by digest, which all runs use."""
    checks = checked(bench)
    if missing := [str(finding) for finding in checks.findings if finding.state == MISSING]:
        raise Different("\n".join(missing))
    bench.use_images({name: str(checks.arguments[name]) for name in bench.package.images if name in checks.arguments})
    unknown = [finding.what for finding in checks.findings if finding.state == UNKNOWN]
    notes = sum(finding.state == NOTE for finding in checks.findings)
    good = sum(finding.state == OK for finding in checks.findings)
    return f"{good} ok, {notes} notes" + (f"; not checked: {some(unknown)}" if unknown else "")


def checked(bench: Bench, *flags: str) -> Preflight:
    """The preflight of a submission; in its arguments the images are by digest.  Raises WrongParameters."""
    args = bench.submission("--preflight", *flags)
    arguments = gather(bench.package, args.params, args.overrides, args.settings)
    checks = submit.preflight(args, bench.package, arguments)
    checks.arguments = {**bench.package.defaults, **arguments}
    return checks


def wrong_parameter(bench: Bench) -> str:
    """One of the science, and one of the cluster."""
    with _makes_nothing(bench):
        try:
            submit.submit(bench.submission("-S", "train.epoch=1", "-C", "nodes=none"))
        except WrongParameters as named:
            for part in ("train.epoch", "nodes=none"):
                if part not in str(named):
                    raise Different(f"{part} is not named: {named}") from None
            return f"exit code {named.exit_code}: " + " / ".join(str(named).splitlines())
    raise Different("it was submitted")


def missing_image(bench: Bench) -> str:
    if bench.args.no_image_check:
        raise NotTried("--no-image-check: the nodes have the images, and no registry is asked")
    known = str({**bench.package.defaults, **bench.arguments()}["train_image"])
    image = f"{re.sub(r'(@sha256:[0-9a-f]+|:[^:/]+)$', '', known)}:{bench.name}"
    with _makes_nothing(bench):
        try:
            submit.submit(bench.submission("-C", f"train_image={image}"))
        except Refused as named:
            found = [line.strip() for line in str(named).splitlines() if "train_image" in line]
            if not found:
                raise Different(f"train_image is not named: {named}") from None
            if "not in its registry" not in found[0]:
                raise NotTried(found[0]) from None
            return f"exit code {named.exit_code}: {found[0]}"
    raise Different("it was submitted")


def missing_secret(bench: Bench) -> str:
    """Steps can do without (a server without a password), so it is a note and not a refusal."""
    with _makes_nothing(bench):
        found: list[Finding] = [
            finding
            for finding in checked(bench, "-C", f"tracking_secret={bench.name}").findings
            if finding.what == f"Secret {bench.name}"
        ]
    unknown = [finding.detail for finding in found if finding.state == UNKNOWN]
    if unknown or not found:
        raise NotTried(unknown[0] if unknown else "no access to Kubernetes")
    if found[0].state not in (NOTE, MISSING) or "not in namespace" not in found[0].detail:
        raise Different(str(found[0]))
    return str(found[0])


@contextlib.contextmanager
def _makes_nothing(bench: Bench) -> Iterator[None]:
    """Raises Different if something was made on the server in this context."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    if bench.pipelines.known_experiment(bench.name):
        raise Different("an experiment was made")
