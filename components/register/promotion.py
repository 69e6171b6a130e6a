"""From a candidate to a version and its aliases, with any number of processes doing the same.

Long work is done without the lease: comparing with the champion, verifying an existing version, uploading a new one.
Then, under the lease, champion and versions are read again.  If they are those that the work was done for, the version
is created, or the existing one taken, and the aliases are moved; otherwise the work is done for the new ones.

A kill between two steps leaves what the next holder of the lease completes: `previous` is what the champion's tag
mlflow.vgg.promoted says, which is written first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from components.register import champion
from components.register.registry import (
    CHALLENGER,
    DAMAGED,
    DUPLICATE,
    PREVIOUS,
    PROMOTED,
    REPLACED,
    ROLLED_BACK,
    Registry,
    State,
    Upload,
    event,
    recorded,
)
from runtime.errors import Refused

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from components.register.lease import Lease
    from vgg.evaluation.gate import Verdict

log = logging.getLogger("vgg.register")


class Candidate(Protocol):
    """What is to be registered."""

    @property
    def weights_sha256(self) -> str: ...

    @property
    def localiser_sha256(self) -> str:
        """Of its localiser; "" without one.  The same weights with another localiser are another version."""

    def upload(self) -> Upload:
        """Store the files of a new version and verify what was stored."""

    def discard(self, upload: Upload) -> None:
        """An upload is not needed: another process has registered the same weights."""

    def verify(self, version: ModelVersion) -> str:
        """What is wrong with the files of an existing version of the same; "" if they are good."""


class Judge(Protocol):
    """What the gate says of the candidate."""

    def __call__(self, state: State) -> Verdict: ...

    def is_quick(self, state: State) -> bool:
        """Whether the verdict takes seconds: the champion need not be evaluated first."""


@dataclass(frozen=True)
class Outcome:
    """version: "" if none was made.  is_new: whether it was made now.  holder: the champion's version afterwards."""

    version: str
    is_new: bool
    verdict: Verdict
    holder: str | None

    @property
    def is_champion(self) -> bool:
        return bool(self.version) and self.holder == self.version

    @property
    def role(self) -> str:
        """What the version is, in words."""
        if self.is_champion:
            return "champion"
        return f"challenger; champion stays version {self.holder}" if self.holder else "challenger"


def register(models: Registry, candidate: Candidate, judge: Judge, replace: bool = False, **times: float) -> Outcome:
    """Register a candidate as far as the gate lets it: not at all, as challenger, as champion.

    judge: the gate for this candidate.  replace: see Registry.state.  times: of the lease.
    """
    intact: set[str] = set()
    upload: Upload | None = None
    while True:
        state = models.state(replace)
        verdict = judge(state)
        if not verdict.registrable:
            return Outcome("", False, verdict, state.holder)
        _verify(models, candidate, state, intact)
        if not intact and upload is None:
            upload = candidate.upload()
        with models.lease(**times) as lease:
            now = models.state(replace)
            same = now.of(candidate.weights_sha256, candidate.localiser_sha256)
            if {str(version.version) for version in same} - intact:
                continue  # a version that another process has made is verified without the lease
            if not now.same_champion(state):
                if not judge.is_quick(now):
                    continue
                verdict = judge(now)
            now = _complete(models, now, lease)
            is_new = not same
            version = _settle(models, same, lease) if same else _create(models, upload, lease)
            aliases = _assign(models, version, now, verdict, replace, candidate.weights_sha256, lease)
        if upload and not is_new:
            candidate.discard(upload)
        return Outcome(version, is_new, verdict, aliases.get(champion.ALIAS))


def _verify(models: Registry, candidate: Candidate, state: State, intact: set[str]) -> None:
    """Verify the existing versions of the candidate that are not in `intact`; damaged ones are marked."""
    for found in state.of(candidate.weights_sha256, candidate.localiser_sha256):
        number = str(found.version)
        if number in intact:
            continue
        if not (damage := candidate.verify(found)):
            intact.add(number)
            continue
        log.warning(
            "%s version %s: has the same weights, but %s; it is marked as damaged (tag %s) and not used any more",
            models.name, number, damage, DAMAGED,
        )  # fmt: skip
        models.tag(number, DAMAGED, damage)


def _create(models: Registry, upload: Upload | None, lease: Lease) -> str:
    if upload is None:
        raise AssertionError("neither a version nor an upload")
    lease.check()
    return models.create(upload)


def _settle(models: Registry, same: list[ModelVersion], lease: Lease) -> str:
    """The lowest of several versions of the same weights; the others are marked, because people may refer to them."""
    first, *others = (str(version.version) for version in same)
    for number in others:
        log.warning("%s version %s: has the weights of version %s, which is used instead", models.name, number, first)
        lease.check()
        models.tag(number, DUPLICATE, first)
    return first


def _assign(
    models: Registry, version: str, state: State, verdict: Verdict, replace: bool, weights: str, lease: Lease
) -> dict[str, str]:
    """Move the aliases as the verdict says; returns all of them."""
    holder = state.holder
    if state.champion and state.champion.weights_sha256 == weights:
        if holder is None or holder == version:
            return state.aliases
        before = recorded(state.versions[holder], PROMOTED)  # the champion in another version: `previous` stays
        models.tag(version, PROMOTED, event(**{"from": before.get("from")}))
        return models.move({champion.ALIAS: version}, lease)
    if not verdict.promoted:
        return models.move({CHALLENGER: version}, lease)
    if holder == version:
        return state.aliases
    lease.check()
    models.tag(version, PROMOTED, event(**{"from": holder}))
    if replace:
        models.tag(version, REPLACED, event(champion=holder))
        if version in state.versions and ROLLED_BACK in state.versions[version].tags:
            models.untag(version, ROLLED_BACK)
    wanted: dict[str, str | None] = {PREVIOUS: holder} if holder else {}
    wanted[champion.ALIAS] = version
    if state.aliases.get(CHALLENGER) == version:
        wanted[CHALLENGER] = None
    return models.move(wanted, lease)


def _complete(models: Registry, state: State, lease: Lease) -> State:
    """Complete the aliases after a process that was killed between two steps."""
    if state.holder not in state.versions:
        return state
    promoted = recorded(state.versions[state.holder], PROMOTED)
    wanted: dict[str, str | None] = {}
    before = promoted.get("from")
    if "from" in promoted and state.aliases.get(PREVIOUS) != before and (before is None or before in state.versions):
        wanted[PREVIOUS] = before
    if state.aliases.get(CHALLENGER) == state.holder:
        wanted[CHALLENGER] = None
    if not wanted:
        return state
    log.warning("%s: a process ended while it moved the aliases; completed: %s", models.name, wanted)
    return State(state.champion, models.move(wanted, lease), state.versions)


def rollback(models: Registry, **times: float) -> tuple[str, str]:
    """Make `previous` the champion again; returns (the champion before, the champion now).

    The version that was champion gets the tag mlflow.vgg.rolled_back: the gate refuses its weights from now on.
    `previous` becomes what was champion before.  Raises Refused if there is nothing to go back to.
    """
    with models.lease(**times) as lease:
        state = _complete(models, models.state(replace=True), lease)
        holder, back = state.holder, state.aliases.get(PREVIOUS)
        if holder is None or back is None or back == holder:
            raise Refused(
                f"registered model {models.name!r}: no version has the alias "
                f"{champion.ALIAS if holder is None else PREVIOUS}, so there is nothing to go back to. To "
                "choose a version yourself, set the alias champion in MLflow."
            )
        before = recorded(state.versions[back], PROMOTED).get("from")
        if before == holder or before not in state.versions:
            before = None
        what = event(**{"from": holder, "to": back})
        lease.check()
        models.tag(holder, ROLLED_BACK, what)
        if ROLLED_BACK in state.versions[back].tags:
            models.untag(back, ROLLED_BACK)
        models.tag(back, PROMOTED, {**what, "from": before, "rolled_back": holder})
        models.move({champion.ALIAS: back, PREVIOUS: before}, lease)
        return holder, back
