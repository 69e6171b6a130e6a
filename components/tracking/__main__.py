"""replay: deliver what waits for MLflow.  ui: show MLflow's pages of the runs (make ui).

Exit code: 0 if nothing waits any more, 69 if the server does not answer, 78 if it refuses; the message says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components import program
from components.tracking.access import connect
from components.tracking.delivery import deliver
from components.tracking.journal import Journal
from runtime import environment
from runtime.errors import Preempted, Problem, Unreachable, WrongParameters
from runtime.wording import counted

log = program.log


def replay(root: Path) -> int:
    """Deliver all journals below a folder; returns the number of events that are still pending.

    Raises Problem as connect does, and the first one, if one or more journals cannot be delivered.
    """
    directories = sorted(path.parent for path in root.glob("*/events.jsonl"))
    if not directories:
        log.info("%s: nothing waits", root)
        return 0
    client, total = connect(), 0
    errors: list[Exception] = []
    for directory in directories:
        try:
            journal = Journal(directory)
        except Preempted:
            log.info("%s: in use by a running stage, which delivers it", directory)
            continue
        try:
            deliver(client, journal)
        except Exception as error:  # the other journals may be deliverable
            errors.append(error)
            log.warning("%s: %s", directory, error)
        pending = journal.pending()
        log.info("%s: %s pending", directory, counted(pending, "event"))
        if not pending and journal.has_ended():
            journal.remove()
        journal.close()
        total += pending
    if errors:
        worst = max(errors, key=lambda error: getattr(error, "exit_code", 0))  # a refusal needs a person, others time
        raise (
            type(worst)(f"{counted(total, 'event')} pending in {root}: {worst}")
            if isinstance(worst, Problem)
            else worst
        )
    return total


def main(argv: Sequence[str] | None = None) -> None:
    flags = program.Parser("components.tracking", __doc__)
    flags.add_argument("command", choices=["replay", "ui"], help="deliver all journals; show the runs in a browser")
    flags.add_argument("--port", type=int, default=5000, help="ui: of the server for a local database")
    args = flags.parse_args(argv)
    if args.command == "ui":
        if not 0 < args.port < 65_536:
            raise WrongParameters(f"--port: must be from 1 to 65,535, not {args.port}")
        from components.tracking import ui

        ui.show(args.port)
        return
    root = environment.JOURNAL.get()
    if pending := replay(root):
        raise Unreachable(f"{counted(pending, 'event')} pending in {root}. Run again.")


if __name__ == "__main__":
    program.run(main)
