"""The arguments of a run: the science from params.yaml and -S, the cluster from -C.  Every mistake is told at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipelines.package import Package
from vgg import manifest
from vgg.errors import WrongParameters
from vgg.params import STAGES, load, section_model

TYPES = {  # of a compiled package: in words, and in Python as YAML reads it
    "STRING": ("a text", (str,)),
    "NUMBER_INTEGER": ("a whole number", (int,)),
    "NUMBER_DOUBLE": ("a number", (int, float)),
    "BOOLEAN": ("true or false", (bool,)),
    "STRUCT": ("a mapping, {…}", (dict,)),
    "LIST": ("a list, […]", (list,)),
}
CPU, MEMORY = r"\d+(\.\d+)?|\d+m", r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?"
QUANTITIES = {  # by the end of a run argument's name
    "_cpu": (CPU, "16 or 500m"),
    "_memory": (MEMORY, "64Gi"),
    "_cpu_request": (CPU, "500m"),
    "_memory_request": (MEMORY, "512Mi"),
    "_gpus": (r"\d+", "1"),
}
FRESH = "images_version"  # stands in sharding's cache key for the content of the folder `images`


def gather(package: Package, params: str, overrides: list[str], settings: list[str]) -> dict[str, Any]:
    """Sections and settings together.  Raises WrongParameters, naming every mistake."""
    mistakes: list[str] = []
    arguments: dict[str, Any] = {}
    try:
        arguments |= sections(params, overrides)
    except WrongParameters as error:
        mistakes.append(str(error))
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            arguments[name] = _value(package, name, text if equals else None)
        except WrongParameters as error:
            mistakes.append(f"-C {setting}: {error}")
    for name, least in (("nodes", 1), ("gpus", 0)):
        if arguments.get(name, least) < least:
            mistakes.append(f"-C {name}={arguments[name]}: must be {least} or more")
    for name, value in arguments.items():
        for ending, (form, example) in QUANTITIES.items():
            if name.endswith(ending) and not re.fullmatch(form, str(value)):
                mistakes.append(f"-C {name}={value}: no quantity of Kubernetes, such as {example}")
    init = arguments.get("train", {}).get("init")
    if init in ("shallower", "checkpoint") and "initial" in package.inputs and not arguments.get("initial"):
        mistakes.append(f"-C initial=… is missing: train.init {init!r} begins with a finished checkpoint's weights")
    for name, about in package.inputs.items():
        if name not in (*STAGES, *arguments, *package.defaults) and not about.get("isOptional"):
            mistakes.append(f"-C {name}=… is missing: the pipeline has no default for it")
    if mistakes:
        raise WrongParameters("\n".join(mistakes))
    whole = {**arguments, **_of_training_step(package, arguments)}
    if mistakes := list(_more_asked_than_allowed({**package.defaults, **whole})):
        raise WrongParameters("\n".join(mistakes))
    return whole


def _more_asked_than_allowed(arguments: dict[str, Any]) -> Iterator[str]:
    """Requests above their limits, with which Kubernetes would not make the pod, in the middle of a run."""
    from kubernetes.utils.quantity import parse_quantity

    for name, value in arguments.items():
        limit = name.removesuffix("_request")
        if name != limit and parse_quantity(str(value)) > parse_quantity(str(arguments[limit])):
            yield f"-C {name}={value} is more than {limit}={arguments[limit]}"


def sections(path: str, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The four sections of a params file with overrides, checked.  Raises WrongParameters, naming every mistake."""
    load(path, STAGES[0], section_model(STAGES[0]))  # a file is checked whole
    yaml = YAML(typ="safe", pure=True)
    document = yaml.load(Path(path))
    mistakes = []
    for override in overrides:
        name, equals, value = override.partition("=")
        *parents, key = name.split(".")
        place = document
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict) or key not in place:
            known = list(place) if isinstance(place, dict) else STAGES
            hint = _did_you_mean(key if isinstance(place, dict) else name.partition(".")[0], known)
            mistakes.append(f"-S {override}: no such parameter{hint}; write SECTION.KEY=VALUE (python -m vgg.params)")
            continue
        try:
            place[key] = yaml.load(value)
        except YAMLError as error:
            mistakes.append(f"-S {override}: not YAML: {error}")
    for stage in STAGES:
        try:
            load(json.dumps(document[stage], default=str), stage, section_model(stage))
        except WrongParameters as error:
            mistakes.append(str(error))
    if mistakes:
        raise WrongParameters("\n".join(mistakes))
    return {stage: document[stage] for stage in STAGES}


def digest(package: Package, arguments: dict[str, Any]) -> str:
    """What makes two submissions the same: the package and every argument, defaults written out."""
    same = json.loads(
        json.dumps({**package.defaults, **arguments}, default=str), parse_int=float
    )  # as the server keeps numbers
    return manifest.digest_of({"package": package.sha256, "arguments": same})


def unvouched(package: Package, arguments: dict[str, Any]) -> bool:
    """Whether sharding reads a folder of whose content the cache key knows nothing."""
    known = {**package.defaults, **arguments}
    return FRESH in known and not known[FRESH] and bool(known.get("images")) and known["shard"]["source"] != "digits"


def _of_training_step(package: Package, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the training step's own pod gets: what training takes, or little where it watches over a TrainJob.

    Where training has no GPU, evaluation has none.
    """
    known = {**package.defaults, **arguments}
    if int(known["nodes"]) == 1:
        step = {"step_gpus": str(known["gpus"])}
        for name in ("cpu", "memory"):
            step |= dict.fromkeys((f"step_{name}", f"step_{name}_request"), known[f"train_{name}"])
    else:
        step = {"step_gpus": "0", "step_cpu": "2", "step_memory": "8Gi"}
        step |= {"step_cpu_request": "100m", "step_memory_request": "1Gi"}
    step |= {f"step_{name}_request": known[f"step_{name}"] for name in ("cpu", "memory") if f"step_{name}" in arguments}
    if not known["gpus"]:
        step["evaluate_gpus"] = "0"
    return {name: value for name, value in step.items() if name in package.inputs and name not in arguments}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _value(package: Package, name: str, text: str | None) -> Any:
    """Raises WrongParameters."""
    if name in STAGES:
        raise WrongParameters(f"is a section of the parameters: change it with -S {name}.KEY=VALUE")
    settable = [known for known in package.inputs if known not in STAGES]
    if name not in settable:
        hint = _did_you_mean(name, settable) or f". There are: {', '.join(sorted(settable))}"
        raise WrongParameters(f"no such run argument{hint}")
    kind = package.inputs[name]["parameterType"]
    words, types = TYPES[kind]
    if text is None:
        raise WrongParameters(f"write {name}=VALUE, {words}")
    try:
        value = YAML(typ="safe", pure=True).load(StringIO(text))
    except YAMLError as error:
        raise WrongParameters(f"not YAML: {' '.join(str(error).split())}") from None
    if kind == "STRING" and not isinstance(value, str | dict | list):
        return text.strip()  # train_cpu=16 is a text, and so are yes and 1e3
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise WrongParameters(f"must be {words}")
    return value


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
