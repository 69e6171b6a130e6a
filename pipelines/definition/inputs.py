"""The run arguments of the pipeline, each declared once: type, default and meaning.

From this come the pipeline's docstring, which kfp compiles into the descriptions of its inputs, the help of -C, and the
table in docs/cluster.md.  Needs no kfp, so --help is fast.  kfp reads literal signatures, so the pipeline repeats names
and types; tests/pipelines/test_inputs.py compares them.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from components import given

WORDS = {int: "integer", str: "string", dict: "mapping", list: "list"}


@dataclass(frozen=True)
class Input:
    """kind: int, str, dict or list.  default: None if the run must give a value, or shown says what it is.

    help: meaning, for users.  shown: the default in words, if the value itself says little.
    """

    name: str
    kind: type
    default: Any
    help: str
    shown: str = ""

    @property
    def text(self) -> str:
        """The default, as users read it."""
        if self.shown or self.default is None:
            return self.shown or "required"
        if self.kind is str:
            return self.default or "empty"
        return json.dumps(self.default)


def _section(name: str, what: str) -> Input:
    return Input(name, dict, None, f"{what}: section {name} of a params file as JSON (pipelines.submit --arguments)")


def _image(name: str, steps: str) -> Input:
    return Input(f"{name}_image", str, None, f"container image of {steps}, best by digest", "of this code")


def _resources(step: str, cpu: str, memory: str, cpu_request: str = "", memory_request: str = "") -> tuple[Input, ...]:
    """Without requests: the limits are requested."""
    also = "" if cpu_request else " and request"
    found = [
        Input(f"{step}_cpu", str, cpu, f"CPUs of the {step} step, limit{also}: a Kubernetes quantity"),
        Input(f"{step}_memory", str, memory, f"memory of the {step} step, limit{also}: a Kubernetes quantity"),
    ]
    if cpu_request:
        found += [
            Input(f"{step}_cpu_request", str, cpu_request, f"CPUs that the {step} step requests; more while free"),
            Input(f"{step}_memory_request", str, memory_request, f"memory that the {step} step requests"),
        ]
    return tuple(found)


OWN_POD = "the training step's own pod"
AS_TRAINING = "as for training: set by pipelines.submit"
DERIVED = "set by pipelines.submit"  # pipelines.arguments
INPUTS = {
    one.name: one
    for one in (
        _section("shard", "data"),
        _section("train", "training"),
        _section("evaluate", "evaluation"),
        _section("register", "gate and registration"),
        Input("images", str, "", "source folder of the images as the steps see it, such as /store/imagenet"),
        Input(
            "images_version", str, "", "stands for the content of images in the cache key: change it with the images"
        ),
        Input("initial", str, "", "finished checkpoint (store:…#…), for train.init shallower or checkpoint"),
        _image("shard", "sharding"),
        _image("train", "training"),
        _image("evaluate", "evaluation"),
        _image("register", "gate, register and report"),
        *(Input(value.argument, value.kind, value.default, value.help) for value in given.CLUSTER.values()
          if value.argument != "train_image"),
        *_resources("shard", "16", "32Gi"),
        *_resources("evaluate", "8", "32Gi"),
        Input("evaluate_gpus", str, "1", 'GPUs of the evaluate step, 1 or 0 (as gpus 0: "0")'),
        Input(
            "step_gpus", str, "1",
            f"GPUs of {OWN_POD}: the same number as gpus with one node, 0 with several ({DERIVED})",
        ),
        Input("step_cpu", str, "16", f"CPUs of {OWN_POD}, limit: train_cpu with one node, 2 with several ({DERIVED})"),
        Input(
            "step_memory", str, "64Gi",
            f"memory of {OWN_POD}, limit: train_memory with one node, 8Gi with several ({DERIVED})",
        ),
        Input("step_cpu_request", str, "16", f"CPUs that {OWN_POD} requests: 100m with several nodes ({DERIVED})"),
        Input(
            "step_memory_request", str, "64Gi", f"memory that {OWN_POD} requests: 2Gi with several nodes ({DERIVED})"
        ),
        *_resources("gate", "2", "4Gi", "100m", "1Gi"),
        *_resources("register", "2", "8Gi", "100m", "2Gi"),
        *_resources("report", "2", "4Gi", "100m", "512Mi"),
    )
}  # fmt: skip
LOCALISE = {
    one.name: one
    for one in (
        _section("localise", "localisation"),
        _image("localise", "localisation"),
        *_resources("localise", given.DEFAULTS["cpu"], given.DEFAULTS["memory"]),
        Input("localise_gpus", str, "1", f"GPUs of the localise step, which is on one node ({AS_TRAINING})"),
    )
}  # only of the pipeline with the step localise
DEFAULTS = {name: one.default for name, one in (INPUTS | LOCALISE).items() if one.default is not None}


def documented(pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with an Args section of all its run arguments in the docstring."""

    @functools.wraps(pipeline)
    def same(*values: Any) -> Any:
        return pipeline(*values)

    inputs = INPUTS | LOCALISE
    lines = [f"    {name}: {inputs[name].help}" for name in inspect.signature(pipeline).parameters]
    same.__doc__ = "\n".join([str(pipeline.__doc__).rstrip(), "", "Args:", *lines, ""])
    return same


def settable() -> list[Input]:
    """The run arguments that -C sets: all but the sections."""
    return [one for one in (INPUTS | LOCALISE).values() if one.kind is not dict or one.default is not None]


def described() -> str:
    """Help of -C, one line each."""
    return "\n".join(f"{one.name} ({WORDS[one.kind]}, {one.text}): {one.help}" for one in settable())


def table() -> str:
    """The same as Markdown."""
    rows = [f"| `{one.name}` | {WORDS[one.kind]} | {_cell(one)} | {one.help} |" for one in settable()]
    return "\n".join(["| -C | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _cell(one: Input) -> str:
    return one.text if one.shown or not one.text or one.default == "" else f"`{one.text}`"
