"""One process at a time changes the versions and aliases of a registered model.

MLflow has no compare-and-swap: tags and aliases are of the last writer.  But the number of a model version is unique
(primary key of its table), and a number is never given twice, also not that of a deleted version.  So the lease is a
queue of tickets: versions of a second registered model, `<name>.lease`.  The lowest ticket holds the lease; a ticket
is renewed by its description, and deleted when its process leaves.

What holds, and where.  Tickets are in MLflow's database, whatever this process has as MLFLOW_TRACKING_URI:
  sqlite          transactions are serial: a ticket that is listed is one, and numbers rise.
  PostgreSQL      (MySQL, SQL Server) a number is computed from committed rows, and the unique index makes a second
                  writer of the same number wait and compute again: so no ticket appears below one that is listed.
  a server        the same, of its database.  Not with --read-replica-backend-store-uri: replicas lag.
No clock is compared with another: a ticket is expired when its description has not changed for `expiry` seconds of
the observer's own clock, so the lease of a killed process is free after that time.  check(), before every change,
renews the ticket: a process that was suspended finds it deleted and changes nothing more.  A request that the server
holds back for longer than `expiry` could still be applied late; only a condition on the write could prevent that, and
MLflow has none.  So what was changed is read back.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import time
import uuid
from types import TracebackType
from typing import TYPE_CHECKING

from components.tracking.patience import GONE, create_version, patiently
from runtime import environment
from runtime.errors import Preempted, Problem
from runtime.store.lease import this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("vgg.register")

EXPIRY_SECONDS = 60.0  # more than all tries of one request (connect() sets its timeout)
PATIENCE_SECONDS = 600.0  # for the others in the queue: each needs seconds
POLL_SECONDS, LONGEST_POLL = 0.1, 1.0  # the next in the queue asks more often than the last
DESCRIPTION = (
    "Lease of registered model {name}, taken by programs that change its versions and aliases. It contains no models."
)


def this_user() -> str:
    """Who acts, for people: the user at the server, or of this machine, and the process."""
    name = environment.TRACKING_USERNAME.get()
    with contextlib.suppress(Exception):  # no name for a container's user
        name = name or getpass.getuser()
    return f"{name or 'unknown user'}, {this_process()}"


class Lease:
    """Hold a registered model, as a context manager.

    expiry: seconds after which the ticket of a killed process is passed over.
    patience: seconds to wait for processes that are alive.
    """

    def __init__(
        self, client: MlflowClient, name: str, expiry: float = EXPIRY_SECONDS, patience: float = PATIENCE_SECONDS
    ) -> None:
        self.client, self.name, self.expiry, self.patience = client, name, expiry, patience
        self.queue = f"{name}.lease"
        self.token, self.owner = uuid.uuid4().hex, this_user()
        self.number = 0  # of our ticket; higher than that of every earlier holder
        self._renewals, self._renewed = 0, 0.0

    def __enter__(self) -> Lease:
        """Raises Preempted (run again) if others hold it all the time."""
        try:
            self._wait()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def check(self) -> None:
        """Renew the lease.  Raises Preempted unless it is still ours; call it before every change.

        Numbers rise, so a ticket that was the lowest is the lowest until it is deleted, and nobody deletes it within
        `expiry` of its last renewal.
        """
        if time.monotonic() - self._renewed < self.expiry / 30:
            return
        while True:
            if not self._renew():
                raise Preempted(
                    f"registered model {self.name!r}: this process was silent for more than {self.expiry:.0f} s, and "
                    "another has taken the lease. Run the same command again."
                )
            if time.monotonic() - self._renewed < self.expiry / 2:  # time for the change, should the server be slow
                return

    def _wait(self) -> None:
        began = time.monotonic()
        seen: dict[int, tuple[str, float]] = {}  # description of a ticket, and since when
        while True:
            if not self.number or not self._renew_in_time():
                self._enqueue()
            tickets = self._tickets()
            own = [number for number, ticket in tickets if ticket.tags.get("token") == self.token]
            for repeated in own[1:]:  # of requests whose answer was lost
                self._delete(repeated)
            self.number = own[0] if own else 0
            if not own:  # passed over while this process was suspended: to the end of the queue
                continue
            ahead = [(number, ticket) for number, ticket in tickets if number < self.number]
            if not ahead:
                return
            now = time.monotonic()
            for number, ticket in ahead:
                description = str(ticket.description)
                if number not in seen or seen[number][0] != description:
                    seen[number] = (description, now)
                elif now - seen[number][1] > self.expiry:
                    self._pass_over(number, ticket)
            if now - began > self.patience:
                raise Preempted(
                    f"registered model {self.name!r}: {ahead[0][1].tags.get('owner', 'an unknown process')} has been "
                    f"changing its versions for {now - began:.0f} s. Run the same command again."
                )
            time.sleep(min(POLL_SECONDS * len(ahead), LONGEST_POLL, self.expiry / 4))

    def _enqueue(self) -> None:
        began, tags = time.monotonic(), {"token": self.token, "owner": self.owner}
        tried = False

        def create() -> None:
            nonlocal tried
            if tried and any(ticket.tags.get("token") == self.token for _, ticket in self._tickets()):
                return  # the answer was lost
            tried = True
            description = DESCRIPTION.format(name=self.name)
            create_version(
                self.client, self.queue, description, f"lease:/{self.token}", tags=tags, description=str(self._renewals)
            )

        patiently(create)
        self.number, self._renewed = -1, began

    def _tickets(self) -> list[tuple[int, ModelVersion]]:
        found = patiently(lambda: list(self.client.search_model_versions(f"name = '{self.queue}'")))
        return sorted(((int(ticket.version), ticket) for ticket in found), key=lambda pair: pair[0])

    def _renew_in_time(self) -> bool:
        return time.monotonic() - self._renewed < self.expiry / 4 or self._renew()

    def _renew(self) -> bool:
        """False if the ticket is gone."""
        from mlflow.exceptions import MlflowException

        began, self._renewals = time.monotonic(), self._renewals + 1
        try:
            patiently(lambda: self.client.update_model_version(self.queue, str(self.number), str(self._renewals)))
        except MlflowException as error:
            if error.error_code not in GONE:
                raise
            return False
        self._renewed = began
        return True

    def _pass_over(self, number: int, found: ModelVersion) -> None:
        log.warning(
            "registered model %r: %s has not renewed its lease for %.0f s, so it ends",
            self.name, found.tags.get("owner", "an unknown process"), self.expiry,
        )  # fmt: skip
        self._delete(number)

    def _delete(self, number: int) -> None:
        from mlflow.exceptions import MlflowException

        try:
            patiently(lambda: self.client.delete_model_version(self.queue, str(number)))
        except MlflowException as error:
            if error.error_code not in GONE:
                raise

    def _leave(self) -> None:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(Problem, MlflowException):  # it expires
            if self.number > 0:
                self._delete(self.number)
