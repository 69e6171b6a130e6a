"""python -m vgg.params: prints every parameter as a Markdown table, generated from the models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from pydantic import BaseModel

from runtime.commandline import Parser
from runtime.parameters import models_in, permitted
from runtime.wording import print_in_every_locale
from vgg.params import OPTIONAL, STAGES, section_model


def rows(path: str, model: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """(dotted name, permitted values, description) of every field, in the order of the file."""
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        yield f"{path}.{name}", permitted(properties[name]), field.description or ""
        for inner in models_in(field):
            yield from rows(f"{path}.{name}", inner)


def main() -> None:
    print("| parameter | values | meaning |\n|---|---|---|")
    for stage in (*STAGES, *OPTIONAL):
        for name, values, description in rows(stage, section_model(stage)):
            print(f"| `{name}` | {values} | {description} |")


if __name__ == "__main__":
    print_in_every_locale()
    Parser("vgg.params", "Print every parameter, as a Markdown table.").parse_args()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: python -m vgg.params | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
