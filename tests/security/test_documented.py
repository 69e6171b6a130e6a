"""Every kubectl command and kustomize patch of docs/, through the kubectl of requirements.lock, without a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, environment
from rendering import render, site

from security.manifests import faults, load

KUBECTL = Path(sys.executable).parent / "kubectl"
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SUBSTITUTION = re.compile(r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")  # $(…)
COMMAND = re.compile(r"kubectl [^|&;#()\n]*")  # of a shell: to the next pipe, list or comment
NOWHERE = "http://127.0.0.1:1"  # nothing listens there: kubectl gets so far only with a command that it accepts
POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}


def blocks(language: str) -> list[str]:
    return [text for page in PAGES for kind, text in FENCE.findall(page.read_text()) if kind == language]


def commands() -> Iterator[str]:
    """From blocks and from prose, each once."""
    shell = [SUBSTITUTION.sub("VALUE", block.replace("\\\n", " ")) for block in blocks("sh")]
    for page in PAGES:
        quoted = re.findall(r"`([^`]*)`", FENCE.sub("", page.read_text()))
        shell += [" ".join(text.split()) for text in quoted if text.startswith("kubectl ")]
    found = [match.partition(" <")[0].strip() for text in shell for match in COMMAND.findall(text)]
    yield from dict.fromkeys(found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a kubeconfig."""
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "x"}
    config |= {"clusters": [{"name": "c", "cluster": {"server": NOWHERE}}]}
    config |= {"contexts": [{"name": "x", "context": {"cluster": "c", "user": ""}}]}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    return tmp_path


def kubectl(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = environment(KUBECONFIG=str(folder / "kubeconfig"))
    return subprocess.run(
        [str(KUBECTL), *words], cwd=folder, env=env, input=json.dumps(POD), capture_output=True, text=True, timeout=60
    )  # fmt: skip


def wrong(command: str, folder: Path) -> str:
    """What kubectl says against a command; '' if it goes as far as to the server."""
    words = shlex.split(command)[1:]
    if len(words) == 1:  # only a mention
        words.append("--help")
    done = kubectl(words, folder)
    if done.returncode == 0 or re.search(r"127\.0\.0\.1:1(: connect: connection refused| was refused)", done.stderr):
        return ""
    return f"{command}: {done.stderr.strip() or done.stdout.strip()}"


def test_kubectl_accepts_every_documented_command(folder: Path) -> None:
    for name in ("site", "store"):
        (folder / "build" / name).mkdir(parents=True)
        site(folder / "build" / name, "overlays/gpu")
    found = list(commands())
    assert len(found) > 35
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert [line for line in pool.map(lambda command: wrong(command, folder), found) if line] == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("kubectl get pods --label app=x", "unknown flag: --label"),
        ("kubectl logs -c main", "expected"),
        ("kubectl remove pod x", 'unknown command "remove"'),
        ("kubectl delete trainjob x --cascade=behind", "invalid cascade value"),
    ],
)
def test_a_wrong_command_would_be_noticed(command: str, words: str, folder: Path) -> None:
    assert words in wrong(command, folder)


def test_every_documented_path_of_an_output_is_valid(folder: Path) -> None:
    """kubectl reads it only after the server's answer."""
    words = [word for command in commands() for word in shlex.split(command)]
    formats = [word for word in words if word.startswith("jsonpath=")]
    assert len(formats) > 3
    for wanted in formats:
        done = kubectl(["create", "configmap", "x", "--dry-run=client", "-o", wanted], folder)
        assert done.returncode == 0, f"{wanted}: {done.stderr}"


def test_every_documented_patch_changes_something_and_keeps_the_rules(folder: Path) -> None:
    prose = [FENCE.sub("", page.read_text()) for page in PAGES]
    assert not [line for text in prose for line in text.splitlines() if "target:" in line]  # else not tried here
    site(folder, "overlays/gpu")
    plain, before = (folder / "kustomization.yaml").read_text(), render(folder)
    patches = [block for block in blocks("yaml") if "target:" in block]
    assert patches
    for patch in patches:
        (folder / "kustomization.yaml").write_text(f"{plain}\npatches:\n{patch}")
        after = render(folder)
        assert after != before
        assert [line for document in load(after) for line in faults(document)] == []
