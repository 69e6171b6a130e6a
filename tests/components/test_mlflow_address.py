"""MLFLOW_TRACKING_URI: what can never work is refused before the work, with the way out."""

from pathlib import Path

import pytest
from conftest import flags, program
from ports import free_port

from components.tracking.address import check_address
from components.tracking.tracker import Tracker
from runtime.errors import WrongParameters

WRONG = {
    "nonsense://x": "unknown scheme nonsense; use http://HOST:5000",
    "htp://mlflow:5000": "unknown scheme htp; did you mean 'http'?",
    "postgres://user:secret@db/mlflow": "did you mean 'postgresql'?",
    "http//mlflow:5000": "write http://mlflow:5000",
    "http://": "no host name",
    "http://:5000": "no host name",
    "http://mlflow:port": "Port could not be cast",
    "http://[::1": "Invalid IPv6",
    "http://my host:5000": "contains blanks",
    "http://mlflow:5000/#/experiments/3": "a page of its web interface; use http://mlflow:5000",
    "mlflow:5000": "write http://mlflow:5000",
    "databricks": "not supported",
    "databricks://profile": "not supported",
    "file:///tmp/mlruns": "no longer supports its file store; use sqlite:////FOLDER/mlflow.db",
    "./mlruns": "no longer supports its file store",
    "sqlite://mlflow.db": "write sqlite:///FILE",
    "sqlite:///:memory:": "write sqlite:///FILE",
}


@pytest.mark.parametrize("uri", WRONG)
def test_an_address_that_can_never_work(uri: str) -> None:
    with pytest.raises(WrongParameters) as refused:
        check_address(uri)
    message = str(refused.value)
    assert message.startswith("MLFLOW_TRACKING_URI=")
    assert WRONG[uri] in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("uri", "used"),
    [
        ("http://mlflow:5000/", "http://mlflow:5000"),
        ("https://mlflow.example.com/tracking//", "https://mlflow.example.com/tracking"),
        ("http://[::1]:5000\n", "http://[::1]:5000"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("postgresql+psycopg2://user:secret@db/mlflow", "postgresql+psycopg2://user:secret@db/mlflow"),
    ],
)
def test_an_address_that_may_work(uri: str, used: str) -> None:
    assert check_address(uri) == used


def test_a_wrong_address_stops_a_stage_before_its_work(images: Path, params_file: Path, tmp_path: Path) -> None:
    done = program("shard", *flags("shard", tmp_path, params_file), cwd=tmp_path, MLFLOW_TRACKING_URI="nonsense://x")
    assert done.returncode == 64
    assert done.stderr.strip().splitlines()[-1].startswith("error: MLFLOW_TRACKING_URI=nonsense://x: unknown scheme")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "shards").exists()


def test_no_journal_is_made_for_a_wrong_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:mlruns")
    with pytest.raises(WrongParameters, match="file store"):
        Tracker("train", "k" * 64, "lineage")
    assert not list(tmp_path.iterdir())


def test_the_pages_of_a_server_that_does_not_answer(tmp_path: Path) -> None:
    """One retry, not the seven of MLflow's client, which take four minutes and are all logged."""
    server = f"http://127.0.0.1:{free_port()}"
    done = program("tracking", "ui", cwd=tmp_path, timeout=60, MLFLOW_TRACKING_URI=server)
    assert done.returncode == 69
    assert done.stderr == (
        f"error: MLflow at {server} does not answer: [Errno 111] Connection refused. Start it, or set "
        "MLFLOW_TRACKING_URI.\n"
    )
