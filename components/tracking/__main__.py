"""python -m components.tracking replay: deliver every journal that waits."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from components.tracking.journal import Journal
from components.tracking.server import connect, deliver
from runtime import environment
from runtime.errors import Preempted

log = logging.getLogger("vgg.tracking")


def replay(root: Path) -> int:
    """Deliver every journal that waits below a folder; returns how many events still wait."""
    client, waiting = connect(), 0
    for directory in sorted(path.parent for path in root.glob("*/events.jsonl")):
        try:
            journal = Journal(directory)
        except Preempted:
            log.info("%s: its stage runs, and sends its events", directory)
            continue
        try:
            deliver(client, journal)
        except Exception as error:
            log.warning("%s: %s", directory, error)
        left, last = journal.waiting(), [event for event, _ in journal.events()][-1:]
        log.info("%s: %d events wait", directory, left)
        if not left and last and last[0].get("status") in ("FINISHED", "FAILED"):
            journal.remove()
        journal.close()
        waiting += left
    return waiting


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if sys.argv[1:] != ["replay"]:
        sys.exit("usage: python -m components.tracking replay")
    sys.exit(69 if replay(environment.JOURNAL.get()) else 0)
