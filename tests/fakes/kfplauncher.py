"""How the launcher of Kubeflow Pipelines 2.17 resolves a container's command, as in its sources
(backend/src/v2/component/launcher_v2.go, compileCmdAndArgs and getPlaceholders).

test_package.py compares this with tests/kubeflow/commands.json, which that code has written.
"""

from __future__ import annotations

import json
import re
from typing import Any

Json = dict[str, Any]
KNOWN = re.compile(  # every placeholder that the launcher replaces
    r"\{\{\$(\.inputs\.parameters\['[^']+'\]|\.(inputs|outputs)\.artifacts\['[^']+'\]\.(uri|path)"
    r"|\.outputs\.parameters\['[^']+'\]\.output_file)?\}\}"
)


def unknown(words: list[str]) -> list[str]:
    """Words with a placeholder that the launcher does not replace."""
    return [word for word in words if "{{" in KNOWN.sub("", word)]


def command(words: list[str], executor_input: Json) -> list[str]:
    """A container's command and arguments, resolved.  In the first word only {{$}} is replaced."""
    found: dict[str, str] = {}
    inputs, outputs = executor_input.get("inputs", {}), executor_input.get("outputs", {})
    for side, artifacts in (("inputs", inputs.get("artifacts", {})), ("outputs", outputs.get("artifacts", {}))):
        for name, listed in artifacts.items():
            uri = listed["artifacts"][0]["uri"]
            found[f"{{{{$.{side}.artifacts['{name}'].uri}}}}"] = uri
            found[f"{{{{$.{side}.artifacts['{name}'].path}}}}"] = "/" + uri.replace("://", "/")
    for name, value in inputs.get("parameterValues", {}).items():
        found[f"{{{{$.inputs.parameters['{name}']}}}}"] = _text(value)
    for name, output in outputs.get("parameters", {}).items():
        found[f"{{{{$.outputs.parameters['{name}'].output_file}}}}"] = output["outputFile"]
    whole = {"{{$}}": json.dumps(executor_input)}
    return [_replaced(words[0], whole), *(_replaced(word, {**whole, **found}) for word in words[1:])]


def _text(value: Any) -> str:
    """As Go formats it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, separators=(",", ":"))


def _replaced(word: str, found: dict[str, str]) -> str:
    for placeholder, value in found.items():
        word = word.replace(placeholder, value)
    return word
