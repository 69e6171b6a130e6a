"""python -m components.tracking replay: deliver all pending journals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components import program
from components.tracking.journal import Journal
from components.tracking.server import connect, deliver, tracking_uri
from runtime import environment
from runtime.errors import Preempted, Unreachable, WrongParameters

log = program.log


def replay(root: Path) -> int:
    """Deliver all journals below a folder; returns the number of events that are still pending."""
    try:
        client, total = connect(), 0
    except ImportError as error:  # the driver of a database
        raise WrongParameters(f"MLFLOW_TRACKING_URI: {tracking_uri()}: {error}. Install it, or use a server.") from None
    except Exception as error:  # of MLflow, or of the database
        raise Unreachable(f"MLflow at {tracking_uri()}: {error}. Start it, or set MLFLOW_TRACKING_URI.") from error
    for directory in sorted(path.parent for path in root.glob("*/events.jsonl")):
        try:
            journal = Journal(directory)
        except Preempted:
            log.info("%s: in use by a running stage, which delivers it", directory)
            continue
        try:
            deliver(client, journal)
        except Exception as error:
            log.warning("%s: %s", directory, error)
        pending = journal.pending()
        log.info("%s: %d events pending", directory, pending)
        if not pending and journal.has_ended():
            journal.remove()
        journal.close()
        total += pending
    return total


def main(argv: Sequence[str] | None = None) -> None:
    flags = program.Parser("components.tracking", __doc__)
    flags.add_argument("action", choices=["replay"], help="deliver the events that MLflow does not have yet")
    flags.parse_args(argv)
    if pending := replay(environment.JOURNAL.get()):
        raise Unreachable(f"MLflow at {tracking_uri()}: {pending} events are still pending. Run this again later.")


if __name__ == "__main__":
    program.run(main)
