"""What is wrong with this project, and the cure of each finding.  It reads only, and repairs nothing.

Exit code: 0 if nothing was found; 78 if something needs a person; otherwise that of what was found: 75 if a process is
at work, 74 if a disk is nearly full, 69 if a service does not answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from components import program

TITLES = ("writers", "files", "caches", "leftovers", "journals", "MLflow", "DVC", "disk", "packages")


def parser() -> program.Parser:
    flags = program.Parser("components.doctor", __doc__)
    flags.add_argument("--deep", action="store_true", help="hash all shards, checkpoints, predictions and caches")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from components.doctor import files, surroundings, tracking, writers
    from components.doctor.finding import Finding, Patient
    from runtime import environment
    from runtime.errors import Preempted, Problem, Refused, StorageFailure, Unreachable
    from runtime.wording import counted

    checks: Sequence[Callable[[Patient], Iterator[Finding]]] = (
        writers.check, files.damaged, files.caches, files.leftovers, tracking.journals, tracking.server,
        surroundings.dvc, surroundings.disk, surroundings.packages,
    )  # fmt: skip
    patient, found, began = Patient(environment.project(), args.deep), list[Finding](), time.monotonic()
    for title, check in zip(TITLES, checks, strict=True):
        findings = list(check(patient))
        program.say(f"{'✗' if findings else '✓'} {title}")
        for finding in findings:
            program.say(f"    {finding.what}\n      → {finding.cure}")
        found += findings
    for note in patient.notes:
        program.say(f"– {note}")
    program.say(f"{time.monotonic() - began:.1f} s{'' if args.deep else '; sizes only, --deep hashes everything'}")
    if not found:
        program.say("healthy")
        return
    problems: dict[int, type[Problem]] = {
        kind.exit_code: kind for kind in (Refused, Preempted, StorageFailure, Unreachable)
    }
    code = max(finding.exit_code for finding in found)
    raise problems.get(code, Refused)(f"{counted(len(found), 'finding')}; cures above")


if __name__ == "__main__":
    program.run(main)
