"""No module of ours uses a format or a call that can run code from data."""

import ast
from collections.abc import Iterator

import pytest
from conftest import ROOT

FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle", "pickletools", "runpy",
    "torch.distributed.checkpoint", "torch.package", "torch.jit", "torch.hub",
}  # fmt: skip


def dangers(text: str) -> Iterator[str]:
    """Expressions of a Python source that could run code from data, one line each."""
    for node in ast.walk(ast.parse(text)):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]  # importlib.import_module("pickle")
        else:
            names = []
        for name in names:
            if any(f"{name}.".startswith(f"{module}.") for module in FORBIDDEN):
                yield f"{line}: {name}"
            if isinstance(node, ast.Import | ast.ImportFrom) and f"{name}.".startswith(("torch.load.", "yaml.")):
                yield f"{line}: {name} under another name, or PyYAML"
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if function == "torch.load" and given.get("weights_only") != "True":
            yield f"{line}: torch.load without weights_only=True"
        if given.get("allow_pickle", "False") != "False" or (function.endswith("np.load") and len(node.args) > 2):
            yield f"{line}: {function} may unpickle"
        if given.get("shell", "False") != "False" or function in ("os.system", "os.popen"):
            yield f"{line}: {function} runs a shell"
        if function in ("eval", "exec", "__import__") or function.endswith(".extractall"):
            yield f"{line}: {function}"
        if function == "YAML" and given.get("typ") != "'safe'":
            yield f"{line}: YAML that may create objects"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import numpy, joblib as j",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "import torch\ntorch.distributed.checkpoint.load({})",
        "importlib.import_module('marshal')",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "torch.load(path, **options)",
        "torch.jit.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
        "np.load(path, allow_pickle=trusted)",
        "subprocess.run(words, shell=True)",
        "os.system(words)",
        "archive.extractall(path)",
        "eval(text)",
        "import yaml",
        "yaml = YAML()",
        "yaml = YAML(typ='unsafe')",
    ],
)
def test_each_danger_is_detected(text: str) -> None:
    assert list(dangers(text))


def test_our_sources_cannot_run_data() -> None:
    harmless = "from vgg import checkpoint\nmodel.eval()\nnp.load(p, 'r')\nnp.load(p, allow_pickle=False)\n"
    assert not list(dangers(harmless + "torch.load(p, weights_only=True)"))
    packages = ("runtime", "vgg", "components", "pipelines", "security")
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(paths) > 90
    found = [f"{path.relative_to(ROOT)}, {danger}" for path in paths for danger in dangers(path.read_text())]
    assert not found
