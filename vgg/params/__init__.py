"""Loads and validates parameters: params.yaml, or one section of it as JSON.

`dvc repro` passes the path of params.yaml, a Kubeflow run passes the section as a JSON argument.  Every stage validates
the whole file, so a mistake in `register` is found before a week of `train`.  Unknown, missing, duplicate, mistyped,
out-of-range and contradictory parameters are all reported at once, with line and suggestion.  The models have no
defaults: every parameter must be in params.yaml.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from runtime.errors import WrongParameters
from runtime.parameters import Lines, check, read_json, read_yaml
from runtime.wording import counted, did_you_mean

log = logging.getLogger("vgg.params")

STAGES = ("shard", "train", "evaluate", "register")
OPTIONAL = ("localise",)  # stages that exist if the file has their section, and it is not null


class Section(BaseModel):
    """Base of every parameter model: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def without_effect(self) -> Iterator[str]:
        """A line for every parameter that has no effect with the others of its section, or not the expected one."""
        yield from ()


S = TypeVar("S", bound=Section)


def section_model(stage: str) -> type[Section]:
    """The parameter model of a stage, in vgg/params/<stage>.py.

    Imported by name, so that a stage's code does not depend on the models of other stages.
    """
    model: type[Section] = getattr(importlib.import_module(f"vgg.params.{stage}"), stage.capitalize() + "Params")
    return model


def load(source: str, stage: str, model: type[S]) -> S:
    """The parameters of one stage; warns of those without effect.

    source: path of a params.yaml, or the section itself as JSON text (it starts with '{').
    Raises WrongParameters that lists every mistake, one per line.
    """
    if source.lstrip().startswith("{"):
        section, mistakes = read_json(source)
        loaded, found = check(stage, model, section, "--params", {})
        _raise_if(mistakes + found, "--params")
        sections: dict[str, Section] = {stage: loaded} if loaded else {}
    else:
        document, lines, mistakes = read_yaml(Path(source))
        sections = load_all(document, source, lines, mistakes)
    # the first stage speaks for all: later ones may follow a week later
    for name in (*STAGES, *OPTIONAL) if stage == STAGES[0] else (stage,):
        for line in sections[name].without_effect() if name in sections else ():
            log.warning("%s.%s", name, line)
    if stage not in sections:
        raise WrongParameters(f"{source}: has no section {stage!r}. Copy one from recipes/digit-scenes.yaml.")
    found_section = sections[stage]
    assert isinstance(found_section, model)
    return found_section


def load_all(
    document: Any, source: str, lines: Lines | None = None, mistakes: list[str] | None = None
) -> dict[str, Section]:
    """All sections of a document.

    source, lines: for messages.  mistakes: found before.  Raises WrongParameters that lists every mistake.
    """
    lines, mistakes = lines or {}, mistakes or []
    if not isinstance(document, dict):
        raise WrongParameters(f"{source}: must contain the sections {', '.join(STAGES)}")
    sections: dict[str, Section] = {}
    for name in STAGES:
        if name not in document:
            mistakes.append(f"{source}: section {name!r} is missing")
            continue
        loaded, found = check(name, section_model(name), document[name], source, lines)
        mistakes += found
        if loaded:
            sections[name] = loaded
    for name in OPTIONAL:
        if document.get(name) is not None:
            loaded, found = check(name, section_model(name), document[name], source, lines)
            mistakes += found
            if loaded:
                sections[name] = loaded
    known = (*STAGES, *OPTIONAL)
    for name in document.keys() - set(known):
        where = f"{source}:{lines.get((str(name),), 1)}"
        mistakes.append(f"{where}: {name}: unknown section{did_you_mean(name, known)}")
    for path, contradiction in contradictions(sections):
        line = f":{lines[path]}" if path in lines else ""
        mistakes.append(f"{source}{line}: {'.'.join(path)}: {contradiction}")
    _raise_if(mistakes, source)
    return sections


def contradictions(sections: dict[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """(section, key) and a message for every parameter that contradicts one of another section."""
    train = sections.get("train")
    for name in ("evaluate", "localise"):
        section = sections.get(name)
        if train and section and (small := [q for q in section.test_scales if q < train.input_size]):
            below = ", ".join(map(str, small))
            yield (name, "test_scales"), f"{below} below train.input_size, {train.input_size}"
    localise = sections.get("localise")
    if train and localise and localise.train_scale < train.input_size:
        yield ("localise", "train_scale"), f"{localise.train_scale} below train.input_size, {train.input_size}"


def _raise_if(mistakes: list[str], source: str) -> None:
    if mistakes:
        heading = f"{source}: {counted(len(mistakes), 'invalid parameter')}:"
        raise WrongParameters("\n".join([heading, *(f"  {mistake}" for mistake in mistakes)]))
