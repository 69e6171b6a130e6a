"""What the launcher of Kubeflow Pipelines 2.17 makes of a container's command, as its sources have it
(backend/src/v2/component/launcher_v2.go, compileCmdAndArgs and getPlaceholders).

tests/kubeflow/commands.json is what that code itself made; test_package.py holds this against it.
"""

from __future__ import annotations

import json
import re
from typing import Any

Json = dict[str, Any]
KNOWN = re.compile(  # every placeholder that is replaced, and what is left of any other
    r"\{\{\$(\.inputs\.parameters\['[^']+'\]|\.(inputs|outputs)\.artifacts\['[^']+'\]\.(uri|path)"
    r"|\.outputs\.parameters\['[^']+'\]\.output_file)?\}\}"
)


def unknown(words: list[str]) -> list[str]:
    """Words with a placeholder that the launcher leaves as it is, for the program to stumble over."""
    return [word for word in words if "{{" in KNOWN.sub("", word)]


def command(words: list[str], executor_input: Json) -> list[str]:
    """A container's command and arguments as the program gets them.  The first word is replaced by {{$}} alone."""
    found: dict[str, str] = {}
    inputs, outputs = executor_input.get("inputs", {}), executor_input.get("outputs", {})
    for side, artifacts in (("inputs", inputs.get("artifacts", {})), ("outputs", outputs.get("artifacts", {}))):
        for name, listed in artifacts.items():
            uri = listed["artifacts"][0]["uri"]
            found[f"{{{{$.{side}.artifacts['{name}'].uri}}}}"] = uri
            found[f"{{{{$.{side}.artifacts['{name}'].path}}}}"] = "/" + uri.replace("://", "/")
    for name, value in inputs.get("parameterValues", {}).items():
        found[f"{{{{$.inputs.parameters['{name}']}}}}"] = _text(value)
    for name, about in outputs.get("parameters", {}).items():
        found[f"{{{{$.outputs.parameters['{name}'].output_file}}}}"] = about["outputFile"]
    whole = {"{{$}}": json.dumps(executor_input)}
    return [_replaced(words[0], whole), *(_replaced(word, {**whole, **found}) for word in words[1:])]


def _text(value: Any) -> str:
    """As Go writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, separators=(",", ":"))


def _replaced(word: str, found: dict[str, str]) -> str:
    for placeholder, value in found.items():
        word = word.replace(placeholder, value)
    return word
