"""The arguments of a run: hyperparameters from params.yaml and -S, run arguments from -C.  All errors are reported at
once."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from components import given
from pipelines.definition.package import Package
from runtime import manifest
from runtime.errors import WrongParameters
from runtime.parameters import read_yaml
from runtime.wording import counted, did_you_mean
from vgg.params import OPTIONAL, STAGES, load_all
from vgg.params.shard import EMBEDDED

log = logging.getLogger("vgg.submit")

TYPES = {  # of a compiled package: description, and Python types that YAML gives
    "STRING": ("a string", (str,)),
    "NUMBER_INTEGER": ("an integer", (int,)),
    "NUMBER_DOUBLE": ("a number", (int, float)),
    "BOOLEAN": ("true or false", (bool,)),
    "STRUCT": ("a mapping, {…}", (dict,)),
    "LIST": ("a list, […]", (list,)),
}
CPU, MEMORY = r"\d+(\.\d+)?|\d+m", r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?"
QUANTITIES = {  # by suffix of a run argument's name: pattern, example
    "_cpu": (CPU, "16 or 500m"),
    "_memory": (MEMORY, "64Gi"),
    "_cpu_request": (CPU, "500m"),
    "_memory_request": (MEMORY, "512Mi"),
    "_gpus": (r"\d+", "1"),
}
SECTIONS = (*STAGES, *OPTIONAL)
IMAGES_VERSION = "images_version"  # represents the content of the folder `images` in sharding's cache key


def gather(package: Package, params: str, overrides: list[str], settings: list[str]) -> dict[str, Any]:
    """Sections and settings together.  Raises WrongParameters with all errors."""
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
    for low in given.below_minimum(arguments):
        mistakes.append(f"-C {low.name}={arguments[low.name]}: must be {low.minimum} or more")
    for name, value in arguments.items():
        for suffix, (pattern, example) in QUANTITIES.items():
            if name.endswith(suffix) and not re.fullmatch(pattern, str(value)):
                mistakes.append(f"-C {name}={value}: must be a Kubernetes quantity, such as {example}")
    init = arguments.get("train", {}).get("init")
    if init in ("shallower", "checkpoint") and "initial" in package.inputs and not arguments.get("initial"):
        mistakes.append(f"-C initial=… is missing: train.init {init!r} needs the weights of a finished checkpoint")
    for name, properties in package.inputs.items():
        if name not in (*SECTIONS, *arguments, *package.defaults) and not properties.get("isOptional"):
            mistakes.append(f"-C {name}=… is missing: the pipeline has no default for it")
    if mistakes:
        raise WrongParameters("\n".join(mistakes))
    complete = {**arguments, **_training_step(package, arguments)}
    if mistakes := list(_requests_above_limits({**package.defaults, **complete})):
        raise WrongParameters("\n".join(mistakes))
    return complete


def _requests_above_limits(arguments: dict[str, Any]) -> Iterator[str]:
    """Kubernetes would reject such pods only in the middle of a run."""
    from kubernetes.utils.quantity import parse_quantity

    for name, value in arguments.items():
        limit = name.removesuffix("_request")
        if name != limit and parse_quantity(str(value)) > parse_quantity(str(arguments[limit])):
            yield f"-C {name}={value} is greater than {limit}={arguments[limit]}"


def sections(path: str, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The sections of a params file with overrides, checked.  Raises WrongParameters with all errors."""
    document, lines, duplicates = read_yaml(Path(path))
    checked = load_all(document, path, lines, duplicates)
    mistakes = list(_apply(overrides, document))
    try:
        checked = load_all(document, "-S") if overrides else checked
    except WrongParameters as error:
        mistakes.append(str(error))
    if mistakes:
        raise WrongParameters("\n".join(mistakes))
    for stage, section in checked.items():
        for line in section.without_effect():
            log.warning("%s.%s", stage, line)
    return {stage: document[stage] for stage in SECTIONS if stage in checked}


def _apply(overrides: list[str], document: dict[str, Any]) -> Iterator[str]:
    """Change the document.  Yields a line about every override that cannot be applied."""
    yaml = YAML(typ="safe", pure=True)
    for override in overrides:
        name, equals, value = override.partition("=")
        *parents, key = name.split(".")
        section = document
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or key not in section:
            known = list(section) if isinstance(section, dict) else STAGES
            hint = did_you_mean(key if isinstance(section, dict) else name.partition(".")[0], known)
            yield f"-S {override}: no such parameter{hint}; write SECTION.KEY=VALUE (python -m vgg.params)"
            continue
        try:
            section[key] = yaml.load(value)
        except YAMLError as error:
            yield f"-S {override}: invalid YAML: {error}"


def localised(path: str, overrides: list[str]) -> bool:
    """Whether a run of this file with overrides has the step localise.

    Overrides that cannot be applied are left out: gather() says why.  Raises WrongParameters for an unreadable file.
    """
    document, _, _ = read_yaml(Path(path))
    if not isinstance(document, dict):
        return False
    list(_apply(overrides, document))
    return document.get("localise") is not None


def digest(package: Package, arguments: dict[str, Any]) -> str:
    """Identity of a submission: the package and all arguments, defaults included."""
    values = json.loads(
        json.dumps({**package.defaults, **arguments}, default=str), parse_int=float
    )  # the server stores all numbers as floats
    return manifest.digest_of({"package": package.sha256, "arguments": values})


def run_name(package: Package, arguments: dict[str, Any], version: str, identity: str) -> str:
    """What it trains and on what, the version, and the identity, by which the same submission finds the run.

    At most 191 characters, which is what the server stores: --version is limited to 100.
    """
    known = {**package.defaults, **arguments}
    train, nodes, gpus = known["train"], int(known["nodes"]), int(known["gpus"])
    scale = train["train_scale"] if isinstance(train["train_scale"], list) else [train["train_scale"]]
    network = train["configuration"] + ("-BN" if train["batch_norm"] else "")
    words = [f"{network} on {known['shard']['source']}", f"S {'-'.join(map(str, scale))}"]
    words += [counted(train["epochs"], "epoch"), f"seed {train['seed']}"]
    words.append((f"{nodes} x " if nodes > 1 else "") + (counted(gpus, "GPU") if gpus else "CPU"))
    return ", ".join([*words, f"{version} {identity[:10]}"])


def for_the_page(arguments: dict[str, Any]) -> str:
    """A JSON object, one argument on each line, whose values can be pasted into the fields of Kubeflow's page."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in arguments.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def unversioned_images(package: Package, arguments: dict[str, Any]) -> bool:
    """Whether sharding reads a folder whose content is not part of the cache key."""
    known = {**package.defaults, **arguments}
    reads_folder = bool(known.get("images")) and known["shard"]["source"] not in EMBEDDED
    return reads_folder and IMAGES_VERSION in known and not known[IMAGES_VERSION]


def _training_step(package: Package, arguments: dict[str, Any]) -> dict[str, Any]:
    """Resources of the training step's own pod: those of training, or small ones if it supervises a TrainJob.

    If training has no GPU, evaluation has none.  Localisation trains on one node like those of training.
    """
    known = {**package.defaults, **arguments}
    if int(known["nodes"]) == 1:
        step = {"step_gpus": str(known["gpus"])}
        for name in ("cpu", "memory"):
            step |= dict.fromkeys((f"step_{name}", f"step_{name}_request"), known[f"train_{name}"])
    else:
        step = {"step_gpus": "0", "step_cpu": "2", "step_memory": "8Gi"}
        step |= {"step_cpu_request": "100m", "step_memory_request": "2Gi"}
    step |= {f"step_{name}_request": known[f"step_{name}"] for name in ("cpu", "memory") if f"step_{name}" in arguments}
    if not known["gpus"]:
        step["evaluate_gpus"] = "0"
    step |= {"localise_gpus": str(known["gpus"])}
    step |= {f"localise_{name}": known[f"train_{name}"] for name in ("cpu", "memory")}
    return {name: value for name, value in step.items() if name in package.inputs and name not in arguments}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _value(package: Package, name: str, text: str | None) -> Any:
    """Raises WrongParameters."""
    if name in SECTIONS:
        raise WrongParameters(f"is a section of params.yaml: change it with -S {name}.KEY=VALUE")
    settable = [known for known in package.inputs if known not in SECTIONS]
    if name not in settable:
        hint = did_you_mean(name, settable) or f". Run arguments: {', '.join(sorted(settable))}"
        raise WrongParameters(f"no such run argument{hint}")
    kind = package.inputs[name]["parameterType"]
    words, types = TYPES[kind]
    if text is None:
        raise WrongParameters(f"write {name}=VALUE, {words}")
    try:
        value = YAML(typ="safe", pure=True).load(StringIO(text))
    except YAMLError as error:
        raise WrongParameters(f"invalid YAML: {' '.join(str(error).split())}") from None
    if kind == "STRING" and not isinstance(value, str | dict | list):
        return text.strip()  # train_cpu=16 is a string, and so are yes and 1e3
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise WrongParameters(f"must be {words}")
    return value
