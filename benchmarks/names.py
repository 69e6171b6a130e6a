"""Checks that older libraries of a GPU machine have every name that a lease uses: python -m benchmarks.names [--record]

Reads, without running it, every file of ours that a lease imports: names of torch and torchvision, and packages that
are imported outside functions.  Each must be in names.txt.  --record writes that file; run it where torch 2.11 and
torchvision 0.26 are installed, with only the wheels of benchmarks/gpu.sh: it records the names that exist there.
Exits with 1 and prints the names that are missing.  Does not check keywords, nor attributes of what a call returns.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("names.txt")
RECORDED_WITH = {"torch": "2.11", "torchvision": "0.26"}
OURS = ("benchmarks", "runtime", "vgg", "components")
OF_TESTS = {"conftest", *(path.stem for path in ROOT.glob("tests/fakes/*.py"))}
ENTRY_POINTS = (
    *(f"benchmarks/{name}.py" for name in ("lease", "machine", "correct", "train", "evaluate", "loader", "cifar10")),
    "tests/conftest.py", "tests/vgg/test_roi.py",
)  # fmt: skip
# imported by name at run time
LOADED = ("vgg.params.shard", "vgg.params.train", "vgg.params.evaluate", "vgg.params.register")


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.names", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--record", action="store_true", help="write names.txt")
    flags.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = flags.parse_args()
    trees = {path: ast.parse(path.read_bytes()) for path in imported_files()}
    used = {name: path for path, tree in trees.items() for name in [*names(tree), *packages(tree)]}
    if args.record:
        if old := [name for name, wanted in RECORDED_WITH.items() if not version(name).startswith(wanted)]:
            sys.exit(f"--record needs {RECORDED_WITH}; other versions are installed of: {', '.join(old)}")
        RECORD.write_text("".join(f"{name}\n" for name in sorted(used) if exists(name)), encoding="utf-8")
    recorded = set(RECORD.read_text(encoding="utf-8").split())
    missing = {name: path for name, path in sorted(used.items()) if name not in recorded or not exists(name)}
    machine.Figures(args.json).add(files=len(trees), names=len(used), missing=list(missing))
    for name, path in missing.items():
        where = "installed" if name in recorded else f"in {RECORD.name}, recorded with torch {RECORDED_WITH['torch']}"
        print(f"{path.relative_to(ROOT)} uses {name}, which is not {where}", file=sys.stderr)
    sys.exit(bool(missing))


def imported_files() -> list[Path]:
    """Our files that a lease imports."""
    found: set[Path] = set()
    waiting = [ROOT / name for name in ENTRY_POINTS] + [path for module in LOADED for path in files_of(module)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            tree = ast.parse(path.read_bytes())
            waiting += [file for module in imported(ast.walk(tree)) for file in files_of(module)]
    return sorted(found)


def files_of(module: str) -> Iterator[Path]:
    """The file of a module of ours, and those of its packages."""
    parts = module.split(".")
    for count in range(1, len(parts) + 1) if parts[0] in OURS else ():
        base = ROOT.joinpath(*parts[:count])
        yield from (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file())


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(tree: ast.Module) -> set[str]:
    """Third-party packages that the file imports outside functions."""
    tops = {name.split(".")[0] for name in imported(tree.body)}
    return tops - set(sys.stdlib_module_names) - set(OURS) - OF_TESTS


def names(tree: ast.Module) -> set[str]:
    """Dotted names of torch and torchvision, without those that the file tests with hasattr."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:  # without `as` it binds the package alone
                bound = alias.asname or alias.name.split(".")[0]
                aliases[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    aliases = {alias: name for alias, name in aliases.items() if name.split(".")[0] in RECORDED_WITH}

    def dotted(node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return aliases.get(node.id)
        if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
            return f"{before}.{node.attr}"
        return None

    found = set(aliases.values()) | {
        name for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (name := dotted(node))
    }
    tested = {
        f"{dotted(node.args[0])}.{node.args[1].value!s}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
        and isinstance(node.args[1], ast.Constant)
    }  # fmt: skip
    return found - tested


def exists(name: str) -> bool:
    """Whether the name exists in this environment.  Only attributes of modules and classes are checked."""
    top, *rest = name.split(".")
    if not rest and importlib.util.find_spec(top) is None:
        return False
    if not rest and top not in RECORDED_WITH:
        return True
    found: object = importlib.import_module(top)
    path = top
    for attribute in rest:
        if not isinstance(found, ModuleType | type):
            return True
        path = f"{path}.{attribute}"
        if hasattr(found, attribute):
            found = getattr(found, attribute)
            continue
        try:
            found = importlib.import_module(path)
        except ImportError:
            return False
    return True


if __name__ == "__main__":
    main()
