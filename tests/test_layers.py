"""The layers of the code: which package may import which, without cycles, and what an import must not load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from vgg.params import STAGES

# package: packages of this repository that it may import
MAY_IMPORT = {
    "runtime": set(),
    "runtime.shards": {"runtime"},
    "runtime.store": {"runtime", "runtime.shards"},
    "runtime.ranks": {"runtime"},
    "vgg": set(),  # draws.py
    "vgg.params": {"runtime"},
    "vgg.data": {"runtime", "runtime.shards", "vgg", "vgg.params"},
    "vgg.sharding": {"runtime", "runtime.shards", "vgg", "vgg.params", "vgg.data"},
    "vgg.network": {"runtime", "vgg"},
    "vgg.weights": {"runtime", "runtime.shards", "vgg.network"},
    "vgg.evaluation": {"runtime", "runtime.shards", "vgg.params", "vgg.data", "vgg.network"},
    "vgg.localisation": {
        "runtime", "runtime.shards", "vgg", "vgg.params", "vgg.data", "vgg.network", "vgg.evaluation", "vgg.training",
        "vgg.sharding",
    },
    "vgg.training": {
        "runtime", "runtime.shards", "vgg", "vgg.params", "vgg.data", "vgg.network", "vgg.evaluation", "vgg.sharding",
    },
}  # fmt: skip
MAX_FILES = 15

FORBIDDEN = {  # modules: what importing them must not load
    "vgg.training.loop, vgg.evaluation.evaluate, runtime.saver, runtime.shards.prefetch": (
        "kfp", "dvc", "mlflow", "boto3", "matplotlib", "pandas", "torch._dynamo",
    ),
    "vgg.sharding.pack": ("torch", "kfp", "dvc", "mlflow", "boto3"),
    "vgg.params": ("torch", "numpy", "kfp", "mlflow"),
    "runtime.store.place": ("torch", "boto3", "kfp", "mlflow"),
    "runtime.ranks.launch": ("torch", "boto3", "kfp", "mlflow"),
    "components.shard.__main__": ("kfp", "torch", "mlflow", "numpy", "pydantic"),
    "components.train.__main__": ("kfp", "torch", "mlflow", "numpy", "pydantic"),
    "components.evaluate.__main__": ("kfp", "torch", "mlflow", "numpy", "pydantic"),
    "components.register.__main__": ("kfp", "torch", "mlflow", "numpy", "pydantic"),
    "components.weights.__main__": ("kfp", "torch", "mlflow", "numpy", "pydantic"),
    "components.stage": ("kfp", "torch", "mlflow", "boto3"),
    "pipelines.submit": ("torch", "mlflow", "kfp"),
    "pipelines.prove.__main__": ("torch", "mlflow", "kfp", "numpy", "pydantic"),
    "pipelines.paper.__main__": ("torch", "mlflow", "kfp", "numpy", "pydantic"),
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def files(*roots: str) -> list[Path]:
    return [path for root in roots for path in sorted((ROOT / root).rglob("*.py"))]


def test_packages_import_only_lower_layers() -> None:
    packages = {package_of(path) for path in files("runtime", "vgg")}
    assert packages == set(MAY_IMPORT)
    for path in files("runtime", "vgg"):
        own = package_of(path)
        for module in imports(path):
            if module.split(".")[0] not in ("runtime", "vgg", "components", "pipelines"):
                continue
            target = (ROOT / module.replace(".", "/")).with_suffix(".py")
            package = package_of(target) if target.is_file() else module
            if package in packages - {own}:
                assert package in MAY_IMPORT[own], f"{path.relative_to(ROOT)} imports {module}"
            assert not module.startswith(("components", "pipelines")), f"{path.relative_to(ROOT)} imports {module}"


def test_there_are_no_import_cycles() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files("runtime", "vgg", "components")
    }
    graph = {name: {module for module in imports(path) if module in names} for name, path in names.items()}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert sorted(graph) == []  # the rest is part of a cycle, or imports one


def test_packages_are_small() -> None:
    count: dict[str, int] = {}
    for path in files("runtime", "vgg", "components", "pipelines"):
        count[package_of(path)] = count.get(package_of(path), 0) + (path.name != "__init__.py")
    assert {name: number for name, number in count.items() if number > MAX_FILES} == {}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_an_import_loads_nothing_unnecessary(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not set(FORBIDDEN[module]) & set(done.stdout.split())


def test_science_does_not_import_the_orchestrators() -> None:
    """Neither at the top of a file nor in functions."""
    forbidden = re.compile(r"^\s*(import|from) (kfp|dvc|mlflow|boto3|components|pipelines)\b", re.M)
    for path in files("vgg"):
        assert not forbidden.search(path.read_text()), path
    in_store = {ROOT / "runtime/store" / name for name in ("s3.py", "patience.py")}
    for path in files("runtime"):
        assert path in in_store or not forbidden.search(path.read_text()), path
    for stage in STAGES:
        for path in (ROOT / "components" / stage).glob("*.py"):
            if path.name != "component.py":
                assert not re.search(r"^\s*(import|from) (kfp|dvc)\b", path.read_text(), re.M), path
