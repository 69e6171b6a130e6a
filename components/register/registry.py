"""The MLflow model registry: the versions and aliases of one registered model, read and changed.

Changes are made under its lease (components.register.promotion), because MLflow has no compare-and-swap.  Every
request may be applied twice, since answers get lost; of the creation of a version that is made sure here.

Tags of a version:  weights_sha256, evaluation, files.sha256, provenance   what it is (JSON: see tags.py)
                    localiser_sha256       of the weights of its localiser, if it has one
                    mlflow.vgg.promoted    when and by whom it became champion, and the champion before: JSON
                    mlflow.vgg.rolled_back the same, of its replacement by the one before; the gate refuses the weights
                    vgg.damaged, vgg.duplicate_of   it is not used any more; why, or the lower version of these weights
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.register import champion
from components.register.champion import Champion
from components.register.lease import Lease, this_user
from components.register.tags import HIDDEN
from components.tracking import access
from components.tracking.address import shown, tracking_uri
from components.tracking.patience import GONE, create_version, find, patiently
from components.tracking.problems import translated
from runtime import environment
from runtime.errors import Preempted, Refused

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("vgg.register")

DESCRIPTION = "VGG (arXiv 1409.1556): JPEG bytes to classes"
CHALLENGER, PREVIOUS = "challenger", "previous"  # the last that passed the absolute rules; the champion before
PROMOTED, ROLLED_BACK = f"{HIDDEN}promoted", f"{HIDDEN}rolled_back"
REPLACED = f"{HIDDEN}replaced_champion"
LOCALISER = "localiser_sha256"
DAMAGED, DUPLICATE = "vgg.damaged", "vgg.duplicate_of"


@contextmanager
def open_registry(name: str) -> Iterator[Registry]:
    """Open a registered model, with exclusive use of MLflow in this process.

    Raises Unreachable if the server does not answer, Refused if it refuses: the login, a permission, or for good.
    """
    with access.MLFLOW_LOCK, translated(), _permissions_explained(name):
        yield Registry(name)


@contextmanager
def _permissions_explained(name: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        raise Refused(
            f"MLflow at {shown(tracking_uri())} denies user {environment.TRACKING_USERNAME.get() or '?'} "
            f"a permission on registered model {name!r}: {error}. An administrator can grant MANAGE on it and on "
            f"'{name}.lease', or delete them if they are empty: the user who creates a model gets MANAGE."
        ) from error


def read_evaluation(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        needed = {"headline", "modes", "top1_error", "top5_error", "num_images", "weights_sha256", "data_digest"}
        missing = needed - found.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise Refused(f"{path}: not a readable evaluation: {error}. Run the evaluate stage.") from None
    if missing:
        raise Refused(f"{path}: lacks {', '.join(sorted(missing))}. Run the evaluate stage.")
    return dict(found)


@dataclass(frozen=True)
class Upload:
    """The files of a version, stored but not registered.  tags, description: of the version."""

    source: str
    run_id: str | None
    tags: dict[str, str]
    description: str
    model_id: str | None = None


@dataclass(frozen=True)
class State:
    """Versions and aliases, read at one time.

    champion: to compare with; None if there is none, or if it is to be replaced without a comparison.
    versions: by number, lowest first.
    """

    champion: Champion | None
    aliases: dict[str, str]
    versions: dict[str, ModelVersion]

    @property
    def holder(self) -> str | None:
        """The version with the alias champion, also if it cannot be compared with."""
        return self.aliases.get(champion.ALIAS)

    @property
    def orphans(self) -> list[str]:
        """All versions, if none of them has the alias champion."""
        return [] if self.holder else list(self.versions)

    def same_champion(self, other: State) -> bool:
        return (self.champion, self.holder) == (other.champion, other.holder)

    def of(self, weights_sha256: str, localiser_sha256: str | None = None) -> list[ModelVersion]:
        """The versions of these weights that are in use, lowest first.

        localiser_sha256: only those with this localiser; "": without one; None: all.
        """
        unused = {DAMAGED, DUPLICATE}
        same = [v for v in self.versions.values() if v.tags.get("weights_sha256") == weights_sha256]
        if localiser_sha256 is not None:
            same = [version for version in same if version.tags.get(LOCALISER, "") == localiser_sha256]
        return [version for version in same if not unused & version.tags.keys()]


class Registry:
    def __init__(self, name: str) -> None:
        self.name = name
        self.client = access.connect()

    def lease(self, **times: float) -> Lease:
        return Lease(self.client, self.name, **times)

    def champion(self) -> Champion | None:
        """The version with the alias champion; None if no version has it.  Raises Refused as champion.read does."""
        return self.state().champion

    def state(self, replace: bool = False) -> State:
        """replace: whether to pass over the champion, which then need not be one of this pipeline."""
        model = patiently(lambda: find(self.client, self.name, DESCRIPTION))
        if model is None:
            return State(None, {}, {})
        aliases = {alias: str(version) for alias, version in model.aliases.items()}
        versions = {str(version.version): version for version in self._versions()}
        holder = aliases.get(champion.ALIAS)
        found = champion.read(self.name, versions[holder]) if holder in versions and not replace else None
        return State(found, aliases, versions)

    def _versions(self) -> list[ModelVersion]:
        """All versions, lowest first."""
        found = patiently(lambda: list(self.client.search_model_versions(f"name = '{self.name}'")))
        return sorted(found, key=lambda version: int(version.version))

    def create(self, upload: Upload) -> str:
        """The version of an upload; made once, however many answers are lost."""
        tried = False

        def made() -> list[str]:
            return [str(v.version) for v in self._versions() if v.source == upload.source]

        def create() -> None:
            nonlocal tried
            if tried and made():
                return  # the answer was lost
            tried = True
            create_version(
                self.client, self.name, DESCRIPTION, upload.source, run_id=upload.run_id, tags=upload.tags,
                description=upload.description, model_id=upload.model_id,
            )  # fmt: skip

        patiently(create)
        first, *repeated = made()
        for number in repeated:  # nobody knows them: they are of a request that was sent twice
            self._delete(number)
        return first

    def _delete(self, number: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            patiently(lambda: self.client.delete_model_version(self.name, number))
        except MlflowException as error:
            if error.error_code not in GONE:
                raise

    def tag(self, number: str, name: str, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        patiently(lambda: self.client.set_model_version_tag(self.name, number, name, text))

    def untag(self, number: str, name: str) -> None:
        patiently(lambda: self.client.delete_model_version_tag(self.name, number, name))

    def alias(self, alias: str, number: str | None) -> None:
        """Set an alias, or delete it."""
        if number is None:
            patiently(lambda: self.client.delete_registered_model_alias(self.name, alias))
        else:
            patiently(lambda: self.client.set_registered_model_alias(self.name, alias, number))

    def promote(self, version: str, before: Champion | None, lease: Lease | None = None) -> None:
        """Make a version the champion, and the champion before it `previous`.  lease: checked before every step.

        The same weights as before in another version are the same champion, with the same `previous`.
        Raises Preempted if another process has changed the aliases.
        """
        first: dict[str, str | None] = {PREVIOUS: before.version} if before and before.version != version else {}
        self.move({**first, champion.ALIAS: version}, lease)

    def move(self, wanted: dict[str, str | None], lease: Lease | None = None) -> dict[str, str]:
        """Set aliases, in this order, and read all back.  None: delete it.  lease: checked before every step.

        Raises Preempted if another process changes them too.
        """
        for alias, number in wanted.items():
            if lease:
                lease.check()
            self.alias(alias, number)
        model = patiently(lambda: self.client.get_registered_model(self.name))
        found = {alias: str(version) for alias, version in model.aliases.items()}
        wrong = {alias: found.get(alias) for alias, number in wanted.items() if found.get(alias) != number}
        if wrong:
            raise Preempted(
                f"registered model {self.name!r}: somebody else is moving its aliases: {wrong} instead of {wanted}. "
                "Run the same command again."
            )
        return found


def event(**what: Any) -> dict[str, Any]:
    """A change, for a tag: what, who and when."""
    return {**what, "by": this_user(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def recorded(version: ModelVersion, tag: str) -> dict[str, Any]:
    """An event of a version; {} if there is none, or people have changed the tag."""
    try:
        return dict(json.loads(version.tags.get(tag, "{}")))
    except (ValueError, TypeError):
        return {}
