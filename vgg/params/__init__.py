"""Loads and validates parameters: params.yaml, or one section of it as JSON.

`dvc repro` passes the path of params.yaml, a Kubeflow run passes the section as a JSON argument.  Every stage validates
the whole file, so a mistake in `register` is found before a week of `train`.  Unknown, missing, duplicate, mistyped and
out-of-range parameters are all reported at once, with line and suggestion.  The models have no defaults: every
parameter must be in params.yaml.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from runtime.errors import WrongParameters
from runtime.wording import counted

STAGES = ("shard", "train", "evaluate", "register")


class Section(BaseModel):
    """Base of every parameter model: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)
Lines = dict[tuple[str, ...], int]


def section_model(stage: str) -> type[Section]:
    """The parameter model of a stage, in vgg/params/<stage>.py.

    Imported by name, so that a stage's code does not depend on the models of other stages.
    """
    model: type[Section] = getattr(importlib.import_module(f"vgg.params.{stage}"), stage.capitalize() + "Params")
    return model


def load(source: str, stage: str, model: type[S]) -> S:
    """The parameters of one stage.

    source: path of a params.yaml, or the section itself as JSON text (it starts with '{').
    Raises WrongParameters that lists every mistake, one per line.
    """
    if source.lstrip().startswith("{"):
        section, duplicates = _read_json(source)
        loaded, mistakes = _check(stage, model, section, "--params", {})
        return _require_valid(loaded, duplicates + mistakes, "--params")

    document, lines, mistakes = _read_yaml(Path(source))
    loaded = None
    for name in STAGES:
        if name not in document:
            mistakes.append(f"{source}: section {name!r} is missing")
            continue
        checked, found = _check(name, model if name == stage else section_model(name), document[name], source, lines)
        mistakes += found
        if name == stage and isinstance(checked, model):
            loaded = checked
    for name in document.keys() - set(STAGES):
        where = f"{source}:{lines.get((name,), 1)}"
        mistakes.append(f"{where}: {name}: unknown section{_did_you_mean(name, STAGES)}")
    return _require_valid(loaded, mistakes, source)


def _require_valid(loaded: S | None, mistakes: list[str], source: str) -> S:
    if mistakes or loaded is None:
        heading = f"{source}: {counted(len(mistakes), 'invalid parameter')}:"
        raise WrongParameters("\n".join([heading, *(f"  {mistake}" for mistake in mistakes)]))
    return loaded


def _read_json(text: str) -> tuple[Any, list[str]]:
    """The section and a message for every duplicate key."""
    duplicates: list[str] = []

    def note_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        duplicates.extend(f"--params: {key}: duplicate" for key in repeated)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=note_duplicates), duplicates
    except ValueError as error:
        raise WrongParameters(f"--params: not a JSON object: {error}") from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], Lines, list[str]]:
    """The document, the line of every key, and a message for every duplicate key.  YAML 1.2: 1e-2 is a number."""
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text)
        document = yaml.load(text)
    except (OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError is a ValueError, too
        raise WrongParameters(f"{path}: cannot be read: {error}. Copy one from recipes/.") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise WrongParameters(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise WrongParameters(f"{path}: not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise WrongParameters(f"{path}: must contain the sections {', '.join(STAGES)}")
    lines: Lines = {}
    duplicates = list(_walk(root, (), lines, str(path)))
    return document, lines, duplicates


def _walk(node: Node, path: tuple[str, ...], lines: Lines, source: str) -> Iterator[str]:
    """Record the line of every key below a YAML node; yield a message for every duplicate key."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            key_path = (*path, str(key.value))
            line = key.start_mark.line + 1
            if key_path in lines:
                yield f"{source}:{line}: {'.'.join(key_path)}: duplicate (first in line {lines[key_path]})"
            lines.setdefault(key_path, line)
            yield from _walk(value, key_path, lines, source)
    elif isinstance(node, SequenceNode):
        for number, value in enumerate(node.value):
            lines.setdefault((*path, str(number)), value.start_mark.line + 1)
            yield from _walk(value, (*path, str(number)), lines, source)


def _whole(value: Any) -> Any:
    """Kubeflow turns 74 into 74.0: turn whole numbers into int again.  (A strict float field accepts an int.)"""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def _check(stage: str, model: type[S], section: Any, source: str, lines: Lines) -> tuple[S | None, list[str]]:
    try:
        return model.model_validate_json(json.dumps(_whole(section), default=str)), []
    except ValidationError as error:
        return None, [_explain(stage, model, e, source, lines) for e in error.errors(include_url=False)]


def _explain(stage: str, model: type[Section], error: Any, source: str, lines: Lines) -> str:
    # pydantic adds the tags of unions to the location; show only keys that are in the file
    known = {str(part) for path in lines for part in path}
    location = tuple(str(part) for part in error["loc"])
    if known:
        location = tuple(p for i, p in enumerate(location) if p in known or i == len(location) - 1)
    path = (stage, *location)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = f"{source}:{line}: " if line else ""
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should", "should", message)
    if error["type"] == "extra_forbidden":
        message = "unknown key" + _did_you_mean(location[-1], _field_names(model))
    elif error["type"] == "missing":
        message = "is missing"
    elif error["type"] != "value_error" and not isinstance(error["input"], dict):  # ours already name the value
        message += f", not {error['input']!r}"
    return f"{where}{'.'.join(path)}: {message}"


def _field_names(model: type[BaseModel]) -> list[str]:
    """Names of all fields of a model and its nested models."""
    schema = model.model_json_schema()
    return sorted({name for s in [schema, *schema.get("$defs", {}).values()] for name in s.get("properties", {})})


def _did_you_mean(word: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
