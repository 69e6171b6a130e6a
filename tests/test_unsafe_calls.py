"""Static check: no module uses calls that can execute the data they read (pickle, eval, a shell)."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

UNPICKLERS = {"pickle", "_pickle", "cPickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "jsonpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle"}


def findings(source: str, reading: bool) -> list[str]:
    """Imports and calls that can execute data.  reading: the module is in vgg/, which must not use WebDataset."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [*module, *(f"{'.'.join([*module, alias.name])}" for alias in node.names)]
            for name in names:
                package = name.split(".")[0]
                if package in UNPICKLERS | {"pipes", "pty"} or name in SHELLS or (reading and package == "webdataset"):
                    found.append(f"line {node.lineno}: imports {name}")
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            last = name.split(".")[-1]
            if name in {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"} | SHELLS:
                found.append(f"line {node.lineno}: calls {name}")
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                found.append(f"line {node.lineno}: {name} without allow_pickle=False")
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append(f"line {node.lineno}: {name} without weights_only=True")
            if options.get("shell", "False") != "False" or last == "create_subprocess_shell":
                found.append(f"line {node.lineno}: {name} with a shell")
            if last in ("unsafe_load", "full_load", "read_pickle") or (
                name == "YAML" and options.get("typ") == "'unsafe'"
            ):
                found.append(f"line {node.lineno}: calls {name}")
    return found


def test_no_module_can_execute_data() -> None:
    files = [path for folder in ("vgg", "runtime", "components") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 40
    found = {
        str(path.relative_to(ROOT)): findings(path.read_text(), path.is_relative_to(ROOT / "vgg")) for path in files
    }
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "import webdataset.tariterators",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "exec(text)",
        "os.system(command)",
        "from os import popen",
    ],
)
def test_the_search_finds_unsafe_code(code: str) -> None:
    assert findings(code, reading=True)
    assert not findings("model.eval(); np.load(path, allow_pickle=False); subprocess.run(['git'])", reading=True)
