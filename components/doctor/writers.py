"""Who is writing: to the outputs of dvc.yaml, in the journals, under DVC's lock, on leases of an object store."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from components.doctor.finding import Finding, Patient, holder, lock_of, writer
from runtime import environment
from runtime.errors import Problem
from runtime.store import storage

LEASE_SECONDS = 60.0  # after which a lease that nobody has renewed is free
STORE_DEPTH = 2  # folders below VGG_STORE in which leases lie


def check(patient: Patient) -> Iterator[Finding]:
    """Also notes who is at work, for the checks after it."""
    for name in patient.outputs:
        if who := holder(lock_of(patient.project / name)):
            patient.at_work.add(name)
            yield writer(name, who)
    for path in sorted(patient.journals.glob("*/events.jsonl")):
        if holder(path):
            patient.at_work.add(path.parent.name)
            yield writer(f"journal {path.parent}", "a stage")
    yield from _dvc(patient)
    store = environment.STORE.get()
    if storage.is_remote(store):
        try:
            yield from _leases(store)
        except Problem as reason:
            yield Finding(f"VGG_STORE: {reason}", "see the message", reason.exit_code)


def _dvc(patient: Patient) -> Iterator[Finding]:
    """Processes in DVC's own table of who writes and reads; it forgets those that are gone."""
    try:
        table = json.loads((patient.project / ".dvc/tmp/rwlock").read_bytes())
        at_work = [*table.get("write", {}).values(), *(one for many in table.get("read", {}).values() for one in many)]
        holders = {int(one["pid"]): str(one["cmd"]) for one in at_work}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for pid, command in holders.items():
        if _is_dvc(pid):
            patient.at_work.add("dvc")
            yield writer(f"DVC ({command[:80]})", f"process {pid}")


def _is_dvc(pid: int) -> bool:
    """Whether a process exists, and where the system tells its command, runs DVC: a number may be used again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    command = Path(f"/proc/{pid}/cmdline")
    return not command.exists() or b"dvc" in command.read_bytes()


def _leases(store: str) -> Iterator[Finding]:
    from runtime.store.lease import LEASE, age
    from runtime.store.s3 import Prefix

    pending = [(store, 0)]
    while pending:
        address, depth = pending.pop()
        prefix = Prefix(address)
        body, answer = prefix.get_with_answer(LEASE)
        if body is not None and age(answer) <= LEASE_SECONDS:
            try:
                who = str(json.loads(body)["owner"])
            except (ValueError, KeyError, TypeError):
                who = "a process"
            yield writer(address, who)
        if depth < STORE_DEPTH:
            pending += [(f"{address}/{name}", depth + 1) for name in prefix.folders()]
