"""The links of a chain, each addressed by its content: version → evaluation → training → data → source; and
localisations → localiser → boxes, training → data → source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from components.lineage.places import Place

VERSION, EVALUATION, TRAINING, DATA, SOURCE = "version", "evaluation", "training", "data", "source"
LOCALISATIONS, LOCALISER, BOXES = "localisations", "localiser", "boxes"  # all three of one stage
STAGE = {  # that makes a link
    VERSION: "register", EVALUATION: "evaluate", LOCALISATIONS: "localise", LOCALISER: "localise", BOXES: "localise",
    TRAINING: "train", DATA: "shard",
}  # fmt: skip
OUTPUT = {  # its argument, and the name of its tag
    EVALUATION: "predictions", LOCALISATIONS: "localisations", LOCALISER: "localiser", BOXES: "boxes",
    TRAINING: "checkpoint", DATA: "shards",
}  # fmt: skip
VERIFIED, DAMAGED, NOT_REACHED = "verified", "damaged", "not reached"


@dataclass
class Link:
    """One link, with everything that is known about it, and the links that it was made from.

    digest: DVC's digest of the folder; of a version, the sha256 of its weights.  title: digest or name, for people.
    params: the section of the stage that made it.  record: its provenance record.  facts: results, for people.
    where: copies and runs, in words.  places: copies that can be read.  notes: what is not known, and why.
    used_by: what was made from it.  state: after verification; findings: what is wrong with it, or was not checked.
    files_sha256, claims: of a version, sha256 of the list of its files, and the evaluation in its tags.
    code: of a network, fingerprints of the science by file.
    """

    kind: str
    digest: str
    title: str
    params: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    where: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    used_by: list[str] = field(default_factory=list)
    inputs: list[Link] = field(default_factory=list)
    state: str = ""
    findings: list[str] = field(default_factory=list)
    files_sha256: str = ""
    claims: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind} {self.title}"

    def all(self) -> Iterator[Link]:
        """This link and all below it, each once."""
        seen: set[int] = set()
        pending = [self]
        while pending:
            link = pending.pop(0)
            if id(link) not in seen:
                seen.add(id(link))
                yield link
                pending += link.inputs

    def find(self, kind: str) -> Link | None:
        """The first link of a kind."""
        return next((link for link in self.all() if link.kind == kind), None)

    def as_json(self) -> dict[str, Any]:
        names = (
            "kind",
            "digest",
            "title",
            "params",
            "record",
            "facts",
            "where",
            "notes",
            "used_by",
            "state",
            "findings",
        )
        shown = {name: getattr(self, name) for name in names if getattr(self, name)}
        return {**shown, "inputs": [link.as_json() for link in self.inputs]}
