"""Check lock files for known vulnerabilities, with pip-audit.

python -m security.audit [LOCK…]

Passed means: the service returns a well-known advisory, every package of the lock was looked up, and everything found
is waived in security/waivers.yaml.  If the service is unreachable, the result is "not run" with exit code 0, so that a
machine without network can continue; --must-run makes that a failure.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.program import Parser, run
from runtime.errors import BadData, Refused, Unreachable, WrongParameters

ROOT = Path(__file__).resolve().parents[1]
OSV = "https://api.osv.dev/v1/query"
KNOWN = {"package": {"name": "mlflow", "ecosystem": "PyPI"}, "version": "2.0.0"}  # has dozens of advisories
PROBE_SECONDS, AUDIT_SECONDS = 20, 540
MAX_WAIVER = datetime.timedelta(days=366)


class NotRun(Exception):
    """The service is unreachable, or does not know a well-known advisory."""


@dataclass(frozen=True)
class Waiver:
    """An accepted advisory: why, and until when."""

    id: str
    package: str
    reason: str
    until: datetime.date


def main(argv: Sequence[str] | None = None) -> None:
    flags = Parser("security.audit", __doc__)
    flags.add_argument("locks", nargs="*", default=[str(ROOT / "requirements.lock")], metavar="LOCK")
    flags.add_argument("--waivers", default=str(ROOT / "security/waivers.yaml"), metavar="FILE")
    flags.add_argument("--service", default=OSV, metavar="URL", help=f"has OSV's query API (default {OSV})")
    flags.add_argument("--must-run", action="store_true", help="exit with 69 if the service is unreachable")
    args = flags.parse_args(argv)
    waivers = read_waivers(Path(args.waivers), datetime.date.today())
    try:
        probe(args.service)
        lines = [audit(Path(lock), waivers, args.service) for lock in args.locks]
    except NotRun as reason:
        if args.must_run:
            raise Unreachable(f"pip-audit: not run ({reason})") from None
        print(f"pip-audit: not run ({reason})")
    else:
        print("\n".join(lines))


def read_waivers(path: Path, today: datetime.date) -> list[Waiver]:
    """Raises BadData with all waivers that are incomplete or expired."""
    from ruamel.yaml import YAML

    waivers, faults = [], []
    for number, entry in enumerate(YAML(typ="safe", pure=True).load(path) or [], 1):
        where = f"{path}: waiver {number}"
        if not isinstance(entry, dict) or entry.keys() != {"id", "package", "reason", "until"}:
            faults.append(f"{where}: must have exactly id, package, reason, until")
        elif not isinstance(entry["until"], datetime.date) or not str(entry["reason"] or "").strip():
            faults.append(f"{where} ({entry['id']}): 'until' must be a date (2027-01-31), 'reason' a sentence")
        elif entry["until"] < today:
            faults.append(
                f"{where} ({entry['id']}): expired on {entry['until']}; update the package, or review the waiver"
            )
        elif entry["until"] - today > MAX_WAIVER:
            faults.append(f"{where} ({entry['id']}): {entry['until']} is more than a year away")
        else:
            waivers.append(Waiver(**entry))
    if faults:
        raise BadData("\n".join(faults))
    return waivers


def probe(service: str) -> None:
    """Raise NotRun unless the service answers and knows a well-known advisory.

    Otherwise a mirror that always answers "nothing found" would make every audit pass.
    """
    if not service.startswith(("https://", "http://127.0.0.1:")):
        raise WrongParameters(f"--service {service}: must be https://")
    request = urllib.request.Request(service, json.dumps(KNOWN).encode(), {"Content-Type": "application/json"})  # noqa: S310  # checked above
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:  # noqa: S310  # nosec B310
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise NotRun(f"{service} answered {error.code} {error.reason}") from None
    except OSError as error:
        raise NotRun(f"{service}: {getattr(error, 'reason', error)}") from None
    except ValueError:
        raise NotRun(f"{service} did not answer with JSON") from None
    if not (isinstance(found, dict) and found.get("vulns")):
        raise NotRun(f"{service} returns no advisory for mlflow 2.0.0, which has dozens; it cannot be trusted")


def audit(lock: Path, waivers: list[Waiver], service: str) -> str:
    """Look up every package of a lock file; returns a summary line.

    Raises Refused for advisories that are not waived, and for packages that were not looked up.
    """
    packages = locked(lock)
    looked_up = look_up(lock, service)
    if missing := sorted(packages - {(package["name"], package.get("version")) for package in looked_up}):
        names = ", ".join(f"{name} {version}" for name, version in missing)
        raise Refused(f"pip-audit: {lock.name}: {len(missing)} of {len(packages)} were not looked up: {names}")
    found = list(vulnerabilities(looked_up))
    not_waived = [
        line for package, ids, line in found if not any(w.package == package and w.id in ids for w in waivers)
    ]
    if not_waived:
        raise Refused("\n".join([f"pip-audit: {lock.name}: known vulnerabilities:", *not_waived]))
    return f"pip-audit: {lock.name}: passed, {len(packages)} packages looked up, {len(found)} advisories waived"


def locked(lock: Path) -> set[tuple[str, str]]:
    """(name, version) of every package of a lock file, each with a hash.  Raises BadData."""
    if not lock.exists():
        raise BadData(f"{lock}: does not exist")
    from packaging.version import Version

    entries = re.split(
        r"\n(?=[A-Za-z0-9])", re.sub(r"^\s*#.*\n", "", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    packages = set()
    for entry in filter(str.strip, entries):
        match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", entry)
        if not match or "--hash=sha256:" not in entry:
            raise BadData(f"{lock}: {entry.splitlines()[0]!r}: not pinned with ==, or without a hash")
        packages.add((re.sub(r"[-_.]+", "-", match[1]).lower(), str(Version(match[2]))))
    if not packages:
        raise BadData(f"{lock}: contains no package")
    return packages


def look_up(lock: Path, service: str) -> list[dict[str, Any]]:
    """pip-audit's result, an entry per package.

    Raises NotRun if the service does not answer any more, Refused for any other failure.
    """
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--require-hashes", "--disable-pip", "--strict",
        "--vulnerability-service", "osv", "--osv-url", service, "--format", "json", "--progress-spinner", "off",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=AUDIT_SECONDS, encoding="utf-8", errors="backslashreplace"
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"{service} took longer than {AUDIT_SECONDS} s") from None
    try:
        return list(json.loads(done.stdout)["dependencies"])
    except ValueError:
        probe(service)  # pip-audit has one exit code for all failures
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise Refused(f"pip-audit: {lock.name}: exit code {done.returncode}: {last}") from None


def vulnerabilities(looked_up: Iterable[dict[str, Any]]) -> Iterable[tuple[str, set[str], str]]:
    """(package, all IDs of the advisory, its line in the report)."""
    for package in looked_up:
        for advisory in package.get("vulns") or []:
            ids = {advisory["id"], *advisory.get("aliases", [])}
            fixed = ", ".join(advisory.get("fix_versions", [])) or "none"
            line = f"  {package['name']} {package['version']}: {', '.join(sorted(ids))}; fixed in: {fixed}"
            yield package["name"], ids, line


if __name__ == "__main__":
    run(main)
