"""Lineage of a version of the real pipeline: in the project, in DVC's cache and remote, on a server."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from chain import flip
from dvcproject import call, tiny_project
from mlflowserver import server
from ports import free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
LINKS = ["version", "evaluation", "training", "data", "source"]


def lineage(where: Path, *options: str, code: int = 0, **env: str) -> str:
    command = (sys.executable, "-m", "components.lineage", "models:/tiny@champion", "--verify", *options)
    return call(where, *command, code=code, timeout=300, **env)


def test_wherever_the_content_lies(empty_database: Path, tmp_path: Path) -> None:
    where = tiny_project(tmp_path / "project", empty_database)
    call(where, "dvc repro", timeout=600)
    said = lineage(where)
    assert all(f"{link} " in said.partition("verified: version")[0] for link in LINKS)
    assert said.count("✓ verified") == 5
    assert "as in params.yaml" in said
    version = Path(json.loads(call(where, sys.executable, "-c", FIND_FILES).splitlines()[-1]))
    for path in ("artifacts/weights.safetensors", "code/vgg/network/model.py", "MLmodel"):
        flip(version / path)
        assert f"version models:/tiny/1: {path}: does not have the sha256" in lineage(where, code=78)
        flip(version / path)
    assert call(where, sys.executable, "-m", "components.doctor", "--deep").endswith("healthy\n")

    # not in the workspace, but in DVC's cache
    shutil.rmtree(where / "data/shards")
    said = lineage(where)
    assert "DVC's cache" in said
    assert said.count("✓ verified") == 5
    cached = max((where / ".dvc/cache/files/md5").glob("??/*"), key=lambda path: path.stat().st_size)
    cached.chmod(0o644)
    call(where, "dvc checkout -q")
    call(where, f"dvc remote add -d store {tmp_path}/store && dvc push -q")

    # nor in the cache, but in a remote, where a bit flips
    shutil.rmtree(where / ".dvc/cache")
    shutil.rmtree(where / "data/shards")
    said = lineage(where)
    assert "DVC remote 'store'" in said
    assert said.count("✓ verified") == 5
    manifest = json.loads((where / "metrics/shard.json").read_text())
    listing = tmp_path / "store/files/md5" / manifest["digest"][:2] / manifest["digest"][2:]
    [shard] = [entry for entry in json.loads(listing.read_text()) if entry["relpath"] == "train-00000.tar"]
    damaged = tmp_path / "store/files/md5" / shard["md5"][:2] / shard["md5"][2:]
    damaged.chmod(0o644)
    flip(damaged, 700)
    said = lineage(where, code=78)
    assert "data" in said.partition("chain is broken")[2]
    assert "DVC remote 'store': train-00000.tar: " in said


FIND_FILES = """
import json, mlflow
client = mlflow.MlflowClient("sqlite:///mlflow.db")
print(json.dumps(client.get_model_version_download_uri("tiny", "1").removeprefix("file://")))
"""


def test_only_a_server(empty_database: Path, tmp_path: Path) -> None:
    """The pipeline tracks to a real server; somebody else asks it, with nothing but its address."""
    where, port = tiny_project(tmp_path / "project", empty_database), free_port()
    (tmp_path / "server").mkdir()
    with server(tmp_path / "server", port, empty_database):
        uri = f"http://127.0.0.1:{port}"
        call(where, "dvc repro", timeout=600, MLFLOW_TRACKING_URI=uri)
        (tmp_path / "elsewhere").mkdir()
        said = lineage(tmp_path / "elsewhere", MLFLOW_TRACKING_URI=uri, PYTHONPATH=str(where))
        assert "version models:/tiny/1   ✓ verified" in said
        assert said.count("– not reached") == 4
        assert "found in    data/images" in said
        [weights] = (tmp_path / "server/artifacts").rglob("weights.safetensors")
        flip(weights)
        said = lineage(tmp_path / "elsewhere", code=78, MLFLOW_TRACKING_URI=uri, PYTHONPATH=str(where))
        assert "weights.safetensors: does not have the sha256 that it was registered with" in said
