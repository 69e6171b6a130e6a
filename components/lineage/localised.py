"""What the links of the stage localise were made from: localisations → localiser → boxes, training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from components.lineage.links import BOXES, DATA, EVALUATION, LOCALISATIONS, LOCALISER, TRAINING, Link


def localised(
    make: Callable[[str, dict[str, Any]], Link],
    link: Link,
    own: Mapping[str, Any],
    inputs: Mapping[str, str],
    later: Mapping[str, Any],
) -> Iterator[Link]:
    """The links below one.  make: of a kind, by what is known of it.  own: manifest of a copy.  inputs: its digests.

    later: what a version says of its training and data.
    """
    run = own.get("run", {})
    if link.kind == LOCALISATIONS:
        localiser = {"digest": inputs.get("localiser"), "weights_sha256": inputs.get("weights_sha256")}
        if any(localiser.values()):
            yield make(LOCALISER, localiser)
        else:
            link.notes.append("it does not say of which localiser it is")
        for name, digest in inputs.items():  # that were fused, or chose the classes
            if name.startswith(("fused_", "classify_")):
                yield make(LOCALISER if name.startswith("fused_") else EVALUATION, {"digest": digest})
    if link.kind == LOCALISER:
        named = {"digest": inputs.get("checkpoint"), "weights_sha256": run.get("initial")}
        classifier = {**later.get(TRAINING, {}), **{name: value for name, value in named.items() if value}}
        if classifier:
            yield make(TRAINING, {**classifier, "known": later})
        if boxes := run.get("boxes") or inputs.get("boxes"):
            yield make(BOXES, {"digest": boxes, "record": link.record})
        else:
            link.notes.append("it does not say of which boxes it is")
    if link.kind == BOXES and (shards := own.get("shards") or inputs.get("shards")):
        yield make(DATA, {"digest": shards})
