"""python -m vgg.params: prints every parameter as a Markdown table, generated from the models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vgg.params import STAGES, section_model


def rows(path: str, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(dotted name, description) of every field, in the order of the file."""
    for name, field in model.model_fields.items():
        yield f"{path}.{name}", field.description or ""
        for inner in models_in(field):
            yield from rows(f"{path}.{name}", inner)


def models_in(field: FieldInfo) -> list[type[BaseModel]]:
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


if __name__ == "__main__":
    print("| parameter | meaning |\n|---|---|")
    for stage in STAGES:
        for name, description in rows(stage, section_model(stage)):
            print(f"| `{name}` | {description} |")
