"""The science closure of a stage: the files of vgg/ that its program imports, directly or indirectly.

dvc.yaml lists exactly these files as code dependencies, and a training run records their fingerprints, so that a change
re-runs only the stages it affects.  runtime/ and components/ cannot change a result and are left out
(tests/vgg/test_golden.py checks this).  `python -m components.closure train` prints the closure.  Container images
contain all files of a program: program().
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vgg", "runtime", "components")


def closure(stage: str) -> list[str]:
    """Paths of the stage's science, relative to the repository, sorted: 'vgg/training/loop.py', ..."""
    return [name for name in program(stage) if name.startswith("vgg/")]


def program(stage: str, *others: str) -> list[str]:
    """Paths of all files of this repository that a stage's program imports, relative to the repository, sorted.

    others: further modules to include.
    """
    found, pending = set(), [f"components.{stage}.__main__", *others]
    while pending:
        module = pending.pop()
        path = _path(module)
        if path is None or path in found:
            continue
        found.add(path)
        pending += _imports(path)
    return sorted(str(p.relative_to(ROOT)) for p in found)


def fingerprints(stage: str) -> dict[str, str]:
    """Fingerprint of every file in the closure.

    A training run compares them before it continues; DVC compares bytes.
    """
    return {name: fingerprint(name) for name in closure(stage)}


def fingerprint(name: str) -> str:
    """sha256 of a file without comments, layout and docstrings, which cannot change a result.

    Therefore no code in vgg/ may read a docstring (checked by tests/components/test_closure.py).
    """
    return fingerprint_of((ROOT / name).read_bytes())


def fingerprint_of(source: bytes) -> str:
    """As fingerprint(), of a file's content.  Raises SyntaxError if it is not Python."""
    return _read(source)[0]


def _path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _imports(path: Path) -> tuple[str, ...]:
    """Modules of this repository that a file imports anywhere, and their parent packages."""
    return _read(path.read_bytes())[1]


@functools.cache
def _read(source: bytes) -> tuple[str, tuple[str, ...]]:
    """Fingerprint and imports of a file; cached because the stages share most files."""
    tree = ast.parse(source)
    modules = tuple(_modules(tree))
    return hashlib.sha256(ast.dump(_WithoutDocstrings().visit(tree)).encode()).hexdigest(), modules


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Remove statements that are only a string."""
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


def main() -> None:
    from components.program import Parser
    from vgg.params import OPTIONAL, STAGES

    flags = Parser("components.closure", __doc__)
    flags.add_argument("stage", choices=(*STAGES, *OPTIONAL))
    print("\n".join(closure(flags.parse_args().stage)))


if __name__ == "__main__":
    from components.program import run

    run(main)
