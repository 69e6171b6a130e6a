"""python -m components.tracking replay: deliver all pending journals."""

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
    """Deliver all journals below a folder; returns the number of events that are still pending."""
    client, total = connect(), 0
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
        pending, last = journal.pending(), [event for event, _ in journal.events()][-1:]
        log.info("%s: %d events pending", directory, pending)
        if not pending and last and last[0].get("status") in ("FINISHED", "FAILED"):
            journal.remove()
        journal.close()
        total += pending
    return total


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if sys.argv[1:] != ["replay"]:
        sys.exit("usage: python -m components.tracking replay")
    sys.exit(69 if replay(environment.JOURNAL.get()) else 0)
