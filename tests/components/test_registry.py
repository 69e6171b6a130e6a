"""The registry with many writers: one version per set of weights, the best is champion, the one before is previous."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from mlflow import MlflowClient
from mlflowservers import mlflow_server

PROMOTERS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, empty_database, "--artifacts-destination", str(folder / "artifacts")) as address:
        yield address


def rounds(count: int, seed: int) -> list[list[tuple[int, int]]]:
    """(weights, wrong images) of every promoter: four sets of weights, each registered twice, some equally good."""
    chance, found = random.Random(seed), []
    for n in range(count):
        sets = [(10 * n + k, chance.choice((5, 5, 6, 8, 12, 30, 60))) for k in range(PROMOTERS // 2)]
        found.append(chance.sample([*sets, *sets], PROMOTERS))
    return found


def promote(address: str, name: str, given: list[list[tuple[int, int]]], timeout: float, **env: str) -> list[dict]:
    """What the processes of tests/fakes/promoters.py registered."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/fakes/promoters.py")],
        input=json.dumps({"name": name, "rounds": given, "expiry": 60}),
        env=environment(MLFLOW_TRACKING_URI=address, **env), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return lines


def check(address: str, name: str, given: list[tuple[int, int]], lines: list[dict[str, Any]]) -> None:
    """The invariants, after all processes have ended."""
    client, wrong = MlflowClient(address, address), dict(given)
    versions = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    weights = {number: int(v.tags["weights_sha256"], 16) for number, v in versions.items()}
    assert sorted(weights.values()) == sorted(wrong), "one version per set of weights"
    assert {(line["version"], line["weights"]) for line in lines} == set(weights.items())
    aliases = {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
    assert wrong[weights[aliases["champion"]]] == min(wrong.values())
    # every champion is better than the one before, which is `previous` at the end
    number, chain = aliases["champion"], []
    while number is not None:
        chain.append(number)
        number = json.loads(versions[number].tags["vgg.promoted"])["from"]
    errors = [wrong[weights[number]] for number in chain]
    assert errors == sorted(set(errors))
    assert aliases.get("previous") == (chain[1] if len(chain) > 1 else None)
    promoted = {number for number, v in versions.items() if "vgg.promoted" in v.tags}
    assert promoted == set(chain), "no promotion is lost"
    assert client.search_model_versions(f"name = '{name}.lease'") == []


def test_eight_processes_register_at_once(server: str) -> None:
    given = rounds(2, seed=1)
    lines = promote(server, "race-{}", given, 120)
    for n, round_ in enumerate(given):
        check(server, f"race-{n}", round_, [line for line in lines if line["round"] == n])
