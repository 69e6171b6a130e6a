"""Checks of requests as in the sources of Kubeflow Pipelines' API server 2.17.

Bodies are checked against the published API, packages and arguments by the server's rules
(backend/src/apiserver/template/v2_template.go).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_plus

import kfp_server_api as api
import kfplauncher
import yaml
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

GRPC = {3: 400, 5: 404, 6: 409, 7: 403, 9: 400, 13: 500, 14: 503, 16: 401}  # code: HTTP status
KEYS = {  # fields that lists can be filtered by
    "experiments": {"experiment_id", "display_name", "created_at", "storage_state", "namespace"},
    "versions": {"pipeline_version_id", "display_name", "name", "created_at", "status"},
    "runs": {"run_id", "display_name", "created_at", "finished_at", "storage_state", "state", "experiment_id"},
    "recurringruns": {"recurring_run_id", "display_name", "created_at", "updated_at"},
}
MATCHES: dict[Any, Callable[[str, str], bool]] = {  # operations of a filter; MySQL's LIKE ignores case
    "EQUALS": lambda found, value: found == value,
    1: lambda found, value: found == value,
    "IS_SUBSTRING": lambda found, value: value.lower() in found.lower(),
}
KINDS = {
    "STRING": str, "NUMBER_INTEGER": (int, float), "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool, "LIST": list, "STRUCT": dict,
}  # fmt: skip


class Wrong(Exception):
    """An error answer.  code: gRPC status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.status = code, GRPC[code]

    def body(self) -> dict[str, Any]:
        text = str(self)
        detail = {"@type": "type.googleapis.com/google.rpc.Status", "code": self.code, "message": text}
        return {"code": self.code, "message": f"wrapped: {text}", "details": [detail]}


class NotInApi(Wrong):
    """A request that does not follow the published API: a bug of the client."""


def known_fields(kind: str, body: Any, where: str = "") -> None:
    """Raise NotInApi for an unknown field (as protojson does, because DiscardUnknown is off)."""
    model = getattr(api, kind, None)
    if model is None or not model.openapi_types or not isinstance(body, dict):
        return
    types = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
    for name, value in body.items():
        if name not in types:
            raise NotInApi(3, f'proto: (line 1:2): unknown field "{where}{name}"')
        known_fields(types[name], value, f"{name}.")


def package(data: bytes) -> dict[str, Any]:
    """A package's documents as the server stores and returns them.  Raises Wrong."""
    documents = list(yaml.safe_load_all(data))
    if len(documents) != 2:
        raise Wrong(3, f"a pipeline and a platform are expected, there are {len(documents)} documents")
    try:
        spec, platform = ParseDict(documents[0], PipelineSpec()), ParseDict(documents[1], PlatformSpec())
    except ParseError as error:
        raise Wrong(3, f"invalid v2 pipeline spec: {error}") from None
    if spec.schema_version != "2.1.0":
        raise Wrong(
            3, f"KFP only supports schema version 2.1.0, but the pipeline spec has version {spec.schema_version}"
        )
    if not re.match(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", spec.pipeline_info.name) or not spec.HasField("root"):
        raise Wrong(3, "invalid v2 pipeline spec: name or root")
    if "kubernetes" not in platform.platforms:
        raise Wrong(3, "no kubernetes platform")
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        container = executor["container"]  # a server accepts any word here, but the run fails
        for word in kfplauncher.unknown([*container.get("command", []), *container.get("args", [])]):
            raise Wrong(3, f"the launcher does not know {word}")
    # protobuf's Struct turns every number into a float
    stored = {"pipeline_spec": MessageToDict(spec), "platform_spec": MessageToDict(platform)}
    floats: dict[str, Any] = json.loads(json.dumps(stored), parse_int=float)
    return floats


def arguments(spec: dict[str, Any], given: dict[str, Any]) -> None:
    """validatePipelineJobInputs: nothing missing, nothing unknown, all types correct.  Raises Wrong."""
    inputs = spec["pipeline_spec"]["root"].get("inputDefinitions", {}).get("parameters", {})
    for name, properties in inputs.items():
        kind = properties["parameterType"]
        if name not in given:
            if not properties.get("isOptional") and "defaultValue" not in properties:
                raise Wrong(
                    3, f"parameter {name} is not optional, yet has neither default value nor user provided value"
                )
        elif not isinstance(given[name], KINDS[kind]) or (isinstance(given[name], bool) and kind != "BOOLEAN"):
            raise Wrong(3, f"input parameter {name} requires type {kind.lower()}")
    if extra := sorted(set(given) - set(inputs)):
        raise Wrong(3, f"parameter(s) provided are not required by pipeline: {', '.join(extra)}")


def listed(kind: str, field: str, query: dict[str, str], items: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer of a list request: filtered, sorted, one page, with the token of the next one.  Raises Wrong."""
    # the server decodes the filter once more than the rest of the query
    predicates = json.loads(unquote_plus(query.get("filter") or "{}")).get("predicates", [])
    for predicate in predicates:
        key, value = predicate["key"], predicate.get("string_value", predicate.get("stringValue"))
        if key not in KEYS[kind] or predicate["operation"] not in MATCHES or value is None:
            raise NotInApi(3, f"failed to parse valid filter from {predicate}")
        items = [item for item in items if MATCHES[predicate["operation"]](str(item.get(key)), value)]
    key, _, direction = query.get("sort_by", "").partition(" ")
    if key and key not in KEYS[kind]:
        raise Wrong(3, f"Cannot sort on field {key}")
    if key:
        items = sorted(items, key=lambda item: str(item[key]), reverse=direction == "desc")
    size, start, same = min(int(query.get("page_size") or 20), 200), 0, [query.get("sort_by"), query.get("filter")]
    if token := query.get("page_token"):
        start, *made_with = json.loads(base64.b64decode(token))
        if made_with != same:
            raise NotInApi(3, "page token does not match the supplied sort by and/or filtering criteria")
    answer = {field: items[start : start + size], "total_size": len(items)}
    if start + size < len(items):
        answer["next_page_token"] = base64.b64encode(json.dumps([start + size, *same]).encode()).decode()
    return answer
