"""One writer on a prefix of an object store.

The lease is an object beside the shards.  Its holder rewrites it every quarter of `expiry`; a lease that was not
rewritten is free, so a killed holder blocks others no longer than that.  Every write names the version it replaces
(If-Match), so only one of several simultaneous writers gets it.  Ages are computed from the store's clock only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

from runtime.errors import Preempted, Problem, Unreachable
from runtime.store.s3 import ConditionFailed, NoConditions, Prefix

LEASE = ".lease"
SETTLE_SECONDS = 2.0  # after which simultaneous writers have all written, on a store without conditional writes
JOIN_SECONDS = 5.0


def this_process() -> str:
    """The description of this process as a holder."""
    return f"process {os.getpid()} of {socket.gethostname()}"


class Lease:
    """Hold a prefix for writing, as a context manager.

    description: the holder, for the message that other processes get.
    expiry: seconds after which a lease is free unless it is renewed.
    """

    def __init__(self, prefix: Prefix, description: str, expiry: float = 60.0) -> None:
        self.prefix, self.description, self.expiry = prefix, description, expiry
        self.token, self.renewals, self.etag = uuid.uuid4().hex, 0, ""
        self.conditional = True
        self.lost = ""
        self.confirmed = 0.0  # time.monotonic() at which the lease was last known to be ours
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Lease:
        """Raises Preempted (run again) while another process holds it."""
        body, answer = self._read()
        if body and age(answer) <= self.expiry:
            raise self._taken(body, age(answer))
        self._write({"IfMatch": answer["ETag"]} if body else {"IfNoneMatch": "*"})
        self._settle()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        if isinstance(error, Unreachable):
            return  # it expires; waiting again for the store would exceed a pod's grace period
        self.thread.join(JOIN_SECONDS)
        if self.thread.is_alive():
            return
        with contextlib.suppress(Problem):
            if self._read()[0].get("token") == self.token:
                self.prefix.delete(LEASE)

    def check(self) -> None:
        """Raise Preempted unless the prefix is still ours."""
        if self.lost:
            raise Preempted(self.lost)
        if (silent := time.monotonic() - self.confirmed) > self.expiry:
            raise Preempted(
                f"{self.prefix.address}: the lease could not be renewed for {silent:.0f} s, so another "
                "process may have taken it. Run the same command again."
            )

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The current lease ({} if there is none) and the store's answer."""
        data, answer = self.prefix.get_with_answer(LEASE)
        if data is None:
            return {}, {}
        body: dict[str, Any] = {"owner": "an unknown process"}
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # damaged: of an unknown process
            body.update({name: str(value) for name, value in dict(json.loads(data)).items()})
        return body, answer

    def _write(self, condition: dict[str, str]) -> None:
        """Replace the lease by ours.  Raises Preempted if another process has changed it."""
        began = time.monotonic()
        self.renewals += 1  # changes the body and so the ETag: a process that saw the last one cannot replace this one
        data = self._body()
        try:
            self.etag = self.prefix.put_bytes(LEASE, data, condition if self.conditional else None)
        except NoConditions:
            self.conditional = False
            self.etag = self.prefix.put_bytes(LEASE, data)
        except ConditionFailed:
            # an earlier try may have been applied and answered with an error: then the lease is ours
            found, answer = self._read()
            if found.get("token") != self.token:
                raise self._taken(found, age(answer)) from None
            self.etag = answer["ETag"]
        self.confirmed = began

    def _body(self) -> bytes:
        body = {"owner": self.description, "token": self.token, "renewals": self.renewals}
        return json.dumps(body).encode()

    def _settle(self) -> None:
        """Find out whether the store supports conditions; if not, the last of several simultaneous writers has it."""
        if self.conditional:
            try:
                self.prefix.put_bytes(LEASE, self._body(), {"IfNoneMatch": "*"})
            except ConditionFailed:
                return
            self.conditional = False
        time.sleep(min(SETTLE_SECONDS, self.expiry / 4))
        self._confirm()

    def _confirm(self) -> None:
        began = time.monotonic()
        found, answer = self._read()
        if found.get("token") != self.token:
            raise self._taken(found, age(answer))
        self.confirmed = began

    def _renew(self) -> None:
        while not self.stop.wait(self.expiry / 4):
            try:
                if not self.conditional:
                    self._confirm()
                self._write({"IfMatch": self.etag})
            except Preempted as reason:
                self.lost = str(reason)
                return
            except Problem:  # the store does not answer: check() decides how long that may last
                continue

    def _taken(self, body: dict[str, Any], age: float) -> Preempted:
        if not body:
            return Preempted(f"{self.prefix.address}: the lease {LEASE} was removed. Run the same command again.")
        return Preempted(
            f"{self.prefix.address}: {body['owner']} is writing there (seen {age:.0f} s ago); "
            f"wait for it or stop it. If it was killed, its lease expires {self.expiry:.0f} s after that time."
        )


def age(answer: dict[str, Any]) -> float:
    """Seconds since an object was written, by the store's clock."""
    if not answer:
        return 0.0
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - answer["LastModified"]).total_seconds())
