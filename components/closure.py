"""The science closure of a stage: the files of vgg/ that its program imports, directly or not.

dvc.yaml lists exactly these as code dependencies and a training run remembers them, so that everything re-runs what
changed and nothing else.  runtime/ and components/ cannot change a result and are not part of it; that this is true is
tested (tests/vgg/test_golden.py).  `python -m components.closure train` prints the closure.  Images hold more:
program() is the whole of it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vgg", "runtime", "components")


def closure(stage: str) -> list[str]:
    """Paths of the stage's science, relative to the repository, sorted: 'vgg/training/loop.py', ..."""
    return [name for name in program(stage) if name.startswith("vgg/")]


def program(stage: str, *others: str) -> list[str]:
    """Paths of all our files that run in a stage, relative to the repository, sorted.

    others: modules that run there too.
    """
    reached, waiting = set(), [f"components.{stage}.__main__", *others]
    while waiting:
        module = waiting.pop()
        path = _path(module)
        if path is None or path in reached:
            continue
        reached.add(path)
        waiting += _imports(path)
    return sorted(str(p.relative_to(ROOT)) for p in reached)


def fingerprints(stage: str) -> dict[str, str]:
    """Fingerprint of every file of the closure: what a training run compares before it is continued.  (DVC goes by
    bytes.)"""
    return {name: fingerprint(name) for name in closure(stage)}


def fingerprint(name: str) -> str:
    """sha256 of a file without comments, layout and docstrings: only what can change a result counts.

    So no result may depend on a docstring, and nothing in vgg/ reads one (tests/components/test_closure.py).
    """
    return _read((ROOT / name).read_bytes())[0]


def _path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _imports(path: Path) -> tuple[str, ...]:
    """Modules of our packages that a file imports anywhere, with the packages around them."""
    return _read(path.read_bytes())[1]


@functools.cache
def _read(source: bytes) -> tuple[str, tuple[str, ...]]:
    """Fingerprint and imports of a file; four stages have most of their files in common."""
    tree = ast.parse(source)
    modules = tuple(_modules(tree))
    return hashlib.sha256(ast.dump(_WithoutDocstrings().visit(tree)).encode()).hexdigest(), modules


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """None, which leaves it out, for a text that stands by itself."""
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


def _modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] in PACKAGES:
                yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


if __name__ == "__main__":
    print("\n".join(closure(sys.argv[1])))
