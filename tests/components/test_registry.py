"""The registry with many writers: one version per set of weights, the best is champion, the one before is previous."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from faultproxy import FaultProxy
from mlflow import MlflowClient
from mlflowservers import mlflow_server
from promoters import Light

from components.register.__main__ import main
from components.register.lease import Lease
from components.register.promotion import Outcome, register, rollback
from components.register.registry import Registry, open_registry
from runtime.errors import Preempted, Refused

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
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fakes/promoters.py")],
        env=environment(MLFLOW_TRACKING_URI=address, **env), text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = child.communicate(json.dumps({"name": name, "rounds": given, "expiry": 60}), timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):  # its processes try on for ever
            os.killpg(child.pid, signal.SIGKILL)
    lines = [json.loads(line) for line in output.splitlines()]
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
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
        number = json.loads(versions[number].tags["mlflow.vgg.promoted"])["from"]
    errors = [wrong[weights[number]] for number in chain]
    assert errors == sorted(set(errors))
    assert aliases.get("previous") == (chain[1] if len(chain) > 1 else None)
    promoted = {number for number, v in versions.items() if "mlflow.vgg.promoted" in v.tags}
    assert promoted == set(chain), "no promotion is lost"
    assert client.search_model_versions(f"name = '{name}.lease'") == []


def test_eight_processes_register_at_once(server: str) -> None:
    given = rounds(2, seed=1)
    lines = promote(server, "race-{}", given, 120)
    for n, round_ in enumerate(given):
        check(server, f"race-{n}", round_, [line for line in lines if line["round"] == n])


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_five_hundred_races(server: str) -> None:
    given = rounds(500, seed=2)
    lines = promote(server, "long-{}", given, 7000)
    for n, round_ in enumerate(given):
        check(server, f"long-{n}", round_, [line for line in lines if line["round"] == n])


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_two_hundred_lost_answers(server: str) -> None:
    """Requests that were applied and answered with 500, or not at all: nothing is made twice, nothing is lost."""
    injected, n = 0, 0
    while injected < 200:
        [round_] = given = rounds(1, seed=100 + n)
        with FaultProxy(server, n, 0.08, ("applied", "dropped")) as proxy:
            lines = promote(proxy.endpoint, f"lost-{n}", given, 600)
        injected += sum(proxy.injected.values())
        check(server, f"lost-{n}", round_, lines)
        n += 1


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_eight_processes_share_a_database_file(empty_database: Path, tmp_path: Path) -> None:
    """Without a server, as dvc exp run does."""
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    given = rounds(3, seed=3)
    lines = promote(f"sqlite:///{tmp_path}/mlflow.db", "file-{}", given, 500)
    for n, round_ in enumerate(given):
        check(f"sqlite:///{tmp_path}/mlflow.db", f"file-{n}", round_, [line for line in lines if line["round"] == n])


HOLD = """
import sys, time
from components.register.__main__ import main
from components.register.lease import Lease
from components.tracking import access
with Lease(access.connect(), "killed"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lease_of_a_killed_process_expires(client: MlflowClient, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment(MLFLOW_TRACKING_URI=uri), stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(Preempted, match=f"process {holder.pid} of .* has been changing its versions"):
            Lease(client, "killed", patience=0.5).__enter__()
        holder.send_signal(signal.SIGKILL)
        began = time.monotonic()
        with Lease(client, "killed", expiry=1.0) as lease:
            assert time.monotonic() - began > 1.0
            lease.check()
        assert client.search_model_versions("name = 'killed.lease'") == []
    finally:
        holder.kill()
        holder.communicate(timeout=10)


def test_a_process_that_was_suspended_changes_nothing_more(client: MlflowClient) -> None:
    with Lease(client, "tiny", expiry=0.4) as suspended, Lease(client, "tiny", expiry=0.4) as other:
        assert other.number > suspended.number
        with pytest.raises(Preempted, match="another has taken the lease"):
            suspended.check()
        other.check()


def add(models: Registry, weights: int, wrong: int, **more: Any) -> Outcome:
    light = Light(models, weights, wrong)
    return register(models, light, light, **more)


def aliases(client: MlflowClient) -> dict[str, int]:
    return dict(client.get_registered_model("tiny").aliases)


def test_aliases_and_rollback(client: MlflowClient) -> None:
    with open_registry("tiny") as models:
        assert add(models, 1, 30).role == "champion"
        assert aliases(client) == {"champion": 1}
        assert add(models, 2, 31).role == "challenger; champion stays version 1"
        assert aliases(client) == {"champion": 1, "challenger": 2}
        assert add(models, 3, 10).is_champion
        assert aliases(client) == {"champion": 3, "previous": 1, "challenger": 2}
        worse = add(models, 4, 80)  # not inferior is another matter
        assert (worse.verdict.passed, worse.version) == (False, "4")
        assert aliases(client) == {"champion": 3, "previous": 1, "challenger": 4}
        assert add(models, 5, 95).version == ""  # an absolute rule
        assert not add(models, 3, 10).is_new

        assert rollback(models) == ("3", "1")
        assert aliases(client) == {"champion": 1, "challenger": 4}
        record = json.loads(client.get_model_version("tiny", "3").tags["mlflow.vgg.rolled_back"])
        assert (record["from"], record["to"]) == ("3", "1")
        assert record["by"] and record["at"]
        with pytest.raises(Refused, match="no version has the alias previous"):
            rollback(models)
        again = add(models, 3, 10)  # dvc repro -f
        assert (again.version, again.is_champion, again.verdict.passed) == ("3", False, False)
        assert "rolled back at" in again.verdict.failures()[0]
        assert add(models, 6, 20).is_champion  # compared with the champion, not with what was rolled back
        assert aliases(client) == {"champion": 5, "previous": 1, "challenger": 3}
        assert add(models, 3, 10, replace=True).is_champion
        assert aliases(client) == {"champion": 3, "previous": 5}
        assert "mlflow.vgg.rolled_back" not in client.get_model_version("tiny", "3").tags
    main(["rollback", "--model-name", "tiny"])
    assert aliases(client) == {"champion": 5, "previous": 1}


def test_what_a_killed_process_left_is_completed(client: MlflowClient) -> None:
    """A kill between two steps of a promotion, after each of them."""
    with open_registry("tiny") as models:
        for weights, wrong in ((1, 30), (2, 20)):
            add(models, weights, wrong)
        client.set_registered_model_alias("tiny", "previous", "2")  # the first step to the champion after 2
        add(models, 3, 25)
        assert aliases(client) == {"champion": 2, "previous": 1, "challenger": 3}
        client.set_registered_model_alias("tiny", "challenger", "2")  # the last step was missing
        assert add(models, 4, 5).is_champion
        assert aliases(client) == {"champion": 4, "previous": 2}


def test_duplicates_of_other_times_are_settled_on_the_lowest(
    client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Two versions of the same weights, made without the lease; the champion is the higher one."""
    with open_registry("tiny") as models:
        light = Light(models, 1, 30)
        for _ in range(2):
            upload = light.upload()
            models.create(upload)
        client.set_registered_model_alias("tiny", "champion", "2")
        assert add(models, 1, 30).version == "1"
        assert aliases(client) == {"champion": 1}
        assert client.get_model_version("tiny", "2").tags["vgg.duplicate_of"] == "1"
        assert "tiny version 2: has the weights of version 1, which is used instead" in caplog.text


def test_a_champion_that_cannot_be_compared_is_replaced_when_asked(client: MlflowClient) -> None:
    client.create_registered_model("tiny")
    client.create_model_version("tiny", "/nowhere", tags={"evaluation": '{"top1_error": NaN}'})
    client.set_registered_model_alias("tiny", "champion", "1")
    with open_registry("tiny") as models:
        with pytest.raises(Refused, match=r"it has no tag 'weights_sha256'(.|\n)*--replace-champion"):
            add(models, 1, 30)
        assert add(models, 1, 30, replace=True).is_champion
    assert aliases(client) == {"champion": 2, "previous": 1}
    assert json.loads(client.get_model_version("tiny", "2").tags["mlflow.vgg.replaced_champion"])["champion"] == "1"


def test_an_alias_that_somebody_else_moves_is_noticed(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_registry("tiny") as models:
        add(models, 1, 30)
        add(models, 2, 20)
        monkeypatch.setattr(models, "alias", lambda alias, number: None)  # what somebody else undoes
        with pytest.raises(Preempted, match="somebody else is moving its aliases"):
            add(models, 3, 10)
