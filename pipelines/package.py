"""The compiled pipeline: what it takes, what it is called, and the bytes that are uploaded."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "vgg-imagenet"


@dataclass(frozen=True)
class Package:
    """text: as it is uploaded.  spec, platform: its two documents."""

    text: str
    spec: dict[str, Any]
    platform: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """The run arguments: parameterType, and defaultValue where there is one."""
        return dict(self.spec["root"].get("inputDefinitions", {}).get("parameters", {}))

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: about["defaultValue"] for name, about in self.inputs.items() if "defaultValue" in about}

    @property
    def images(self) -> list[str]:
        """The run arguments that are container images."""
        return [name for name in self.inputs if name.endswith("_image")]

    def keys(self, argument: str) -> dict[str, bool]:
        """What steps read of the ConfigMap or Secret a run argument names, and whether they can do without."""
        found: dict[str, bool] = {}
        for executor in self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
            for kind, key in (("configMap", "configMapKey"), ("secret", "secretKey")):
                for source in executor.get(f"{kind}AsEnv", []):
                    if _argument(source[f"{kind}NameParameter"]) == argument:
                        optional = bool(source.get("optional"))
                        found |= {pair[key]: found.get(pair[key], True) and optional for pair in source["keyToEnv"]}
        return found

    def is_spec(self, uploaded: Any) -> bool:
        """Whether a version's pipeline_spec, as the server gives it back, is this package's."""
        from google.protobuf.json_format import ParseError

        found = uploaded if isinstance(uploaded, dict) else {}
        try:
            theirs = _messages(found.get("pipeline_spec"), found.get("platform_spec"))
        except ParseError:
            return False
        return theirs == _messages(self.spec, self.platform)

    def uncached(self, argument: str) -> Package:
        """The package whose tasks that read this run argument run every time."""
        spec = copy.deepcopy(self.spec)
        for component in (spec["root"], *spec["components"].values()):
            for task in component.get("dag", {}).get("tasks", {}).values():
                if argument in map(_argument, task.get("inputs", {}).get("parameters", {}).values()):
                    task["cachingOptions"] = {}
        return Package(_text(spec, self.platform), spec, self.platform)


def compile_package(path: Path) -> None:
    """Write the pipeline's IR; the same bytes every time."""
    from kfp import compiler

    from pipelines.imagenet import vgg_imagenet

    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(vgg_imagenet, str(path))


def compiled() -> Package:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{NAME}.yaml"
        compile_package(path)
        text = path.read_text()
    from google.protobuf.json_format import MessageToDict

    from pipelines.imagenet import vgg_imagenet

    return Package(text, MessageToDict(vgg_imagenet.pipeline_spec), MessageToDict(vgg_imagenet.platform_spec))


def version_name(package: Package) -> str:
    """What its version is called: the commit, and the package's own digest where that does not say everything."""
    commit = _git("rev-parse", "--short=12", "HEAD").strip()
    if not commit:
        return f"package-{package.sha256[:12]}"
    # what a pipeline run writes into the work tree is no change of the code
    changed = _git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!metrics")
    return f"{commit}-dirty-{package.sha256[:8]}" if changed else commit


def _git(*arguments: str) -> str:
    """Its output; '' outside of a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _argument(source: dict[str, Any]) -> str:
    """The run argument that a value comes from; '' if it comes from elsewhere."""
    return str(source.get("componentInputParameter", "")).removeprefix("pipelinechannel--")


def _text(*documents: dict[str, Any]) -> str:
    """As YAML, of which JSON is a part."""
    return "\n---\n".join(json.dumps(document, indent=1, sort_keys=True) for document in documents) + "\n"


def _messages(spec: Any, platform: Any) -> tuple[Any, Any]:
    """Both documents as protobuf has them: with no difference between 1 and 1.0, or between absent and default."""
    from google.protobuf.json_format import ParseDict
    from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

    return (
        ParseDict(spec or {}, PipelineSpec(), ignore_unknown_fields=True),
        ParseDict(platform or {}, PlatformSpec(), ignore_unknown_fields=True),
    )
