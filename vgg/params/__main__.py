"""python -m vgg.params: prints every parameter as a Markdown table, generated from the models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vgg.params import STAGES, section_model


def rows(path: str, model: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """(dotted name, permitted values, description) of every field, in the order of the file."""
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        yield f"{path}.{name}", values(properties[name]), field.description or ""
        for inner in models_in(field):
            yield from rows(f"{path}.{name}", inner)


def models_in(field: FieldInfo) -> list[type[BaseModel]]:
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def values(schema: dict[str, Any]) -> str:
    """The permitted values of a field in words.  schema: its JSON schema; "" if it is a section of its own."""
    if alternatives := [values(one) for one in schema.get("anyOf", [])]:
        return " or ".join(alternatives)
    if "const" in schema or "enum" in schema:
        return ", ".join(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        count = f"{most} " if least == most else f"{least} or more " if least else ""
        return f"list of {count}({values(schema['items'])})"
    named = {"boolean": "true, false", "integer": "integer", "number": "number", "string": "text"}
    if kind not in named:
        return ""
    bounds = [
        f"{sign} {schema[key]:,}".removesuffix(".0")
        for key, sign in [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
        if key in schema
    ]
    bounds += [f"a multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return " ".join([named[kind], ", ".join(bounds)]).strip()


def main() -> None:
    print("| parameter | values | meaning |\n|---|---|---|")
    for stage in STAGES:
        for name, permitted, description in rows(stage, section_model(stage)):
            print(f"| `{name}` | {permitted} | {description} |")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: python -m vgg.params | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
