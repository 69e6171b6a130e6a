"""Reads parameters from YAML or JSON and checks them against pydantic models; every mistake gets one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from runtime.errors import WrongParameters
from runtime.wording import did_you_mean

M = TypeVar("M", bound=BaseModel)
Keys = tuple[str, ...]
Lines = dict[Keys, int]  # of keys, by path
NAMED = {"boolean": "true or false", "integer": "an integer", "number": "a number", "string": "text"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def read_json(text: str) -> tuple[Any, list[str]]:
    """The value of the argument --params and a message for every duplicate key.  Raises WrongParameters."""
    duplicates: list[str] = []

    def note_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        duplicates.extend(f"--params: {key}: duplicate" for key in repeated)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=note_duplicates), duplicates
    except (ValueError, RecursionError) as error:
        raise WrongParameters(f"--params: not a JSON object: {error}") from None


def read_yaml(path: Path) -> tuple[Any, Lines, list[str]]:
    """The document, the line of every key, and a message for every duplicate key.  YAML 1.2: 1e-2 is a number."""
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text)
        document = yaml.load(text)
    except OSError as error:
        raise WrongParameters(f"{path}: cannot be read: {error.strerror}. Copy one from recipes/.") from None
    except UnicodeDecodeError as error:  # a ValueError, too
        raise WrongParameters(f"{path}: not a text file in UTF-8 ({error.reason}). Copy one from recipes/.") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise WrongParameters(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise WrongParameters(f"{path}: not valid YAML: {error}") from None
    lines: Lines = {}
    duplicates = list(_walk(root, (), lines, str(path)))
    return document, lines, duplicates


def _walk(node: Node, path: Keys, lines: Lines, source: str) -> Iterator[str]:
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


def check(name: str, model: type[M], section: Any, source: str, lines: Lines) -> tuple[M | None, list[str]]:
    """The validated section, or None and a message for every mistake.  name: of the section.  source: for messages."""
    section = _whole(section)
    try:
        return model.model_validate_json(json.dumps(section, default=str)), []
    except ValidationError as error:
        found = (_explain(name, model, section, e, source, lines) for e in error.errors(include_url=False))
        return None, list(dict.fromkeys(found))  # a value has one error for each alternative that it does not fit


def _whole(value: Any) -> Any:
    """Kubeflow turns 74 into 74.0: turn whole numbers into int again.  (A strict float field accepts an int.)"""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def _explain(name: str, model: type[BaseModel], section: Any, error: Any, source: str, lines: Lines) -> str:
    owner, field, value = model, None, section
    path: Keys = (name,)
    for part in error["loc"]:  # it also contains the names of pydantic's types, which say nothing to users
        if isinstance(value, dict) and (part in value or (error["type"] == "missing" and part == error["loc"][-1])):
            owner = next((inner for inner in models_in(field) if part in inner.model_fields), owner) if field else owner
            field = owner.model_fields.get(part)
            path, value = (*path, str(part)), value.get(part)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return f"{source}:{line}: " * bool(line) + f"{'.'.join(path)}: {_wrong(error, model, owner, path[-1], value)}"


def _wrong(error: Any, model: type[BaseModel], owner: type[BaseModel], key: str, value: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key" + did_you_mean(key, field_names(model))
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "value_error":  # from a validator of the model
        return str(error["msg"]).removeprefix("Value error, ")
    schema = owner.model_json_schema()["properties"].get(key, {})
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = schema["discriminator"]["propertyName"]
        given = f", not {value[tag]!r}" if tag in value else ""
        return f"{tag} must be {' or '.join(schema['discriminator']['mapping'])}{given}"
    hint = did_you_mean(value, schema["enum"]) if "enum" in schema else ""
    return f"must be {permitted(schema) or 'keys with values'}, not {value!r}{hint}"


def permitted(schema: dict[str, Any]) -> str:
    """The permitted values of a field in words.  schema: its JSON schema; "" if it is a section of its own."""
    if alternatives := [permitted(one) for one in schema.get("anyOf", [])]:
        return " or ".join(alternatives)
    if "const" in schema or "enum" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if "pattern" in schema:
        return f"text of the form {schema['pattern'].strip('^$')}"
    kind = schema.get("type")
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        count = f"{most} " if least == most else f"{least} or more " if least else ""
        return f"a list of {count}({permitted(schema['items'])})"
    bounds = [f"{sign} {schema[key]:,}".removesuffix(".0") for key, sign in BOUNDS.items() if key in schema]
    bounds += [f"a multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return " ".join([NAMED.get(str(kind), ""), ", ".join(bounds)]).strip()


def models_in(field: FieldInfo) -> list[type[BaseModel]]:
    """The models of a field that is a section of its own."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def field_names(model: type[BaseModel]) -> list[str]:
    """Names of all fields of a model and its nested models."""
    schema = model.model_json_schema()
    return sorted({name for s in [schema, *schema.get("$defs", {}).values()] for name in s.get("properties", {})})
