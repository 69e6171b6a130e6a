"""The compiled pipeline: its run arguments, its version name, and the bytes that are uploaded."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgg.params import OPTIONAL

NAME = "vgg-imagenet"
STEPS = ("shard", "train", "evaluate", "localise", "gate", "register", "report")  # in the order in which they run


@dataclass(frozen=True)
class Package:
    """text: as uploaded.  spec, platform: its two documents."""

    text: str
    spec: dict[str, Any]
    platform: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """The run arguments: parameterType, and defaultValue if it has one."""
        return dict(self.spec["root"].get("inputDefinitions", {}).get("parameters", {}))

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: found["defaultValue"] for name, found in self.inputs.items() if "defaultValue" in found}

    @property
    def images(self) -> list[str]:
        """The run arguments that are container images."""
        return [name for name in self.inputs if name.endswith("_image")]

    def keys(self, argument: str) -> dict[str, bool]:
        """Keys that steps read from the ConfigMap or Secret named by a run argument, and whether each is optional."""
        found: dict[str, bool] = {}
        for executor in self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
            for kind, key in (("configMap", "configMapKey"), ("secret", "secretKey")):
                for source in executor.get(f"{kind}AsEnv", []):
                    if _argument(source[f"{kind}NameParameter"]) == argument:
                        optional = bool(source.get("optional"))
                        found |= {pair[key]: found.get(pair[key], True) and optional for pair in source["keyToEnv"]}
        return found

    def is_spec(self, uploaded: Any) -> bool:
        """Whether a version's pipeline_spec, as the server returns it, is this package's."""
        from google.protobuf.json_format import ParseError

        found = uploaded if isinstance(uploaded, dict) else {}
        try:
            theirs = _messages(found.get("pipeline_spec"), found.get("platform_spec"))
        except ParseError:
            return False
        return theirs == _messages(self.spec, self.platform)

    def uncached(self, argument: str) -> Package:
        """A copy in which the tasks that read this run argument are never cached."""
        spec = copy.deepcopy(self.spec)
        for component in (spec["root"], *spec["components"].values()):
            for task in component.get("dag", {}).get("tasks", {}).values():
                if argument in map(_argument, task.get("inputs", {}).get("parameters", {}).values()):
                    task["cachingOptions"] = {}
        return Package(_text(spec, self.platform), spec, self.platform)


def compile_package(path: Path, localised: bool = False) -> None:
    """Write the compiled pipeline; deterministic to the byte.  localised: with the step localise."""
    from kfp import compiler

    from pipelines.definition.imagenet import pipeline

    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline(localised), str(path))


def compiled(localised: bool = False) -> Package:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{NAME}.yaml"
        compile_package(path, localised)
        text = path.read_text(encoding="utf-8")
    from google.protobuf.json_format import MessageToDict

    from pipelines.definition.imagenet import pipeline

    made = pipeline(localised)
    return Package(text, MessageToDict(made.pipeline_spec), MessageToDict(made.platform_spec))


def version_name(package: Package) -> str:
    """The commit, with the package's digest if the work tree has changes; the digest alone outside of a repository.

    With the names of optional steps, because one commit has packages with and without them.
    """
    commit = _git("rev-parse", "--short=12", "HEAD").strip()
    if not commit:
        return f"package-{package.sha256[:12]}"
    # files that a DVC run writes into the work tree are not code
    changed = _git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!metrics")
    steps = "".join(f"-{name}" for name in OPTIONAL if name in package.inputs)
    return f"{commit}{steps}-dirty-{package.sha256[:8]}" if changed else f"{commit}{steps}"


def _git(*arguments: str) -> str:
    """Its output; '' if it fails, as outside of a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[2], capture_output=True, timeout=30,
            encoding="utf-8", errors="backslashreplace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _argument(source: dict[str, Any]) -> str:
    """The run argument that provides a value; '' for another source."""
    return str(source.get("componentInputParameter", "")).removeprefix("pipelinechannel--")


def _text(*documents: dict[str, Any]) -> str:
    """As YAML; JSON is a subset of it."""
    return "\n---\n".join(json.dumps(document, indent=1, sort_keys=True) for document in documents) + "\n"


def _messages(spec: Any, platform: Any) -> tuple[Any, Any]:
    """Both documents as protobuf messages, where 1 equals 1.0, and absent equals default."""
    from google.protobuf.json_format import ParseDict
    from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

    return (
        ParseDict(spec or {}, PipelineSpec(), ignore_unknown_fields=True),
        ParseDict(platform or {}, PlatformSpec(), ignore_unknown_fields=True),
    )
