"""Static check: every text file and every output of a program is read and written as UTF-8, not as the locale says."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, environment

PROGRAMS = ("vgg", "runtime", "components", "pipelines", "benchmarks", "security")


def findings(source: str) -> list[str]:
    """Calls that read or write text without an encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        name, words = ast.unparse(node.func), [ast.unparse(argument) for argument in node.args]
        last = name.split(".")[-1]
        if last in ("read_text", "write_text"):
            text, given = True, len(words) > (last == "write_text")
        elif name in ("open", "io.open", "os.fdopen"):
            text, given = "b" not in options.get("mode", words[1] if len(words) > 1 else "'r'"), len(words) > 3
        elif last in ("TemporaryFile", "NamedTemporaryFile"):
            text, given = "b" not in options.get("mode", words[0] if words else "'w+b'"), False
        elif name.startswith("subprocess."):
            text, given = bool({"text", "universal_newlines", "encoding"} & options.keys()), False
            if "errors" not in options:  # another program may write anything
                options.pop("encoding", None)
        else:
            continue
        if text and not given and "encoding" not in options:
            found.append(f"line {node.lineno}: {name}")
    return found


def test_text_is_utf8_in_every_locale() -> None:
    files = [path for folder in PROGRAMS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): findings(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "code",
    [
        "open(path)",
        "open(path, 'w')",
        "open(path, mode='a')",
        "os.fdopen(fd, 'r')",
        "path.read_text()",
        "Path('x').read_text(errors='replace')",
        "path.write_text(text)",
        "tempfile.NamedTemporaryFile('w')",
        "subprocess.run(command, text=True)",
        "subprocess.run(command, encoding='utf-8')",
        "subprocess.Popen(command, universal_newlines=True)",
    ],
)
def test_the_search_finds_text_without_encoding(code: str) -> None:
    assert findings(code)


def test_the_search_accepts_bytes_and_encodings() -> None:
    code = (
        "open(path, 'rb'); open(path, encoding='utf-8'); open(path, mode='wb'); path.read_text('utf-8'); "
        "path.write_text(text, encoding='utf-8'); subprocess.run(command); os.open(path, flags); "
        "tempfile.TemporaryFile(); subprocess.run(command, encoding='utf-8', errors='replace')"
    )
    assert findings(code) == []


@pytest.mark.parametrize("command", ["vgg.params", "components.shard --help"])
def test_programs_print_in_every_locale(command: str) -> None:
    """Their texts hold ≥ and →, which an ASCII terminal lacks."""
    ascii_only = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    line = [sys.executable, "-m", *command.split()]
    done = subprocess.run(line, cwd=ROOT, env=ascii_only, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"\\" in done.stdout
