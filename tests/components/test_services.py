"""The services of docker/compose.yaml, without containers: PostgreSQL, an S3 store, MLflow with the file's command.

The whole pipeline of the digits tracks to them and keeps shards, checkpoints, models and DVC's remote there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import pandas as pd
import pytest
import yaml
from composed import Composed, docker_compose, interpolated
from conftest import ROOT, environment
from dvcproject import call, tiny_project
from mlflow import MlflowClient

from components import services
from components.images import reference
from security.canary import find
from vgg.sharding.sources import Digits

NEEDED = {"POSTGRES_PASSWORD", "S3_SECRET_KEY", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY"}


@pytest.fixture
def dotenv(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    services.main([])
    return dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("#"))


def test_no_password_has_a_default(dotenv: dict[str, str]) -> None:
    assert len({dotenv[name] for name in NEEDED}) == len(NEEDED)
    assert all(re.fullmatch("[0-9a-f]{48}", dotenv[name]) for name in NEEDED)
    compose = (ROOT / "docker/compose.yaml").read_text()
    interpolated(compose, {**dotenv, "VGG_SERVE_IMAGE": "serve"})
    for name in NEEDED:
        with pytest.raises(KeyError, match=name):
            interpolated(compose, {**dotenv, "VGG_SERVE_IMAGE": "serve", name: ""})


def test_compose_can_write_what_it_is_given(dotenv: dict[str, str]) -> None:
    """Docker Compose writes the content of a config into the container, and refuses that if its root is read-only."""
    file = yaml.safe_load(interpolated((ROOT / "docker/compose.yaml").read_text(), {**dotenv, "VGG_SERVE_IMAGE": "s"}))
    read_only = [service for service in file["services"].values() if service.get("read_only")]
    assert read_only
    for config in [config for service in read_only for config in service.get("configs", [])]:
        path = ROOT / "docker" / file["configs"][config["source"]]["file"]
        assert path.stat().st_mode & 0o004, f"{path}: the server runs as another user"


@pytest.mark.images
@pytest.mark.timeout(3600)
def test_the_pipeline_with_docker_compose(
    dotenv: dict[str, str], empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["docker", "compose", "ls"]
    if not shutil.which("docker") or subprocess.run(asked, capture_output=True, timeout=60).returncode:
        pytest.skip("needs a Docker engine and Docker Compose 2.24 or later")
    command = [sys.executable, "-m", "pipelines.build", "--engine", "docker"]
    command += [
        word for name in ("BASE", "CA") if name in os.environ for word in (f"--{name.lower()}", os.environ[name])
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3000)
    (folder := tmp_path / "services").mkdir()
    bind = "127.0.0.2"  # the ports are the file's
    given = {name: value.replace("localhost", bind) for name, value in dotenv.items()}
    with docker_compose(
        folder, {**given, "VGG_SERVE_IMAGE": reference("register"), "BIND": bind, "MLFLOW_HOSTS": f"{bind}:5000"}
    ):
        use(given, tmp_path, empty_database, monkeypatch)
    assert not [name for name in NEEDED if find(given[name], folder / "mlflow.log")]


@pytest.mark.images
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("store", ["rclone", "seaweedfs"])
def test_the_pipeline_with_all_its_data_in_the_services(
    store: str, dotenv: dict[str, str], empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = Composed(tmp_path / "services", {**dotenv, "VGG_SERVE_IMAGE": "serve"})
    composed.folder.mkdir()
    with composed.postgres(), composed.s3(store):
        for said in ("made", "exists"):
            command, given = composed.command("buckets"), composed.environment("buckets")
            done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)
            assert (done.returncode, done.stderr.count(said)) == (0, 3), done.stderr
        with composed.mlflow():
            given = {name: composed.local(value) for name, value in dotenv.items()}
            use(given, tmp_path, empty_database, monkeypatch)
    # the password of the database is in no log and in no file but .env
    for name in NEEDED:
        assert not find(dotenv[name], tmp_path / "work", tmp_path / "services/mlflow.log", tmp_path / "colleague"), name


def use(given: dict[str, str], tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline, a model that answers, and DVC, with the services of this .env."""
    env = {name: value for name, value in given.items() if name not in NEEDED}
    env["VGG_CACHE"] = str(tmp_path / "cache")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    expect_safe(env)
    run_pipeline(tmp_path / "work", env)
    expect_kept(env)
    share_with_dvc(tmp_path, env, database)


def expect_safe(env: dict[str, str]) -> None:
    """Nobody without the password; no other host name."""
    import requests

    search = f"{env['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=1"
    login = (env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"])
    assert requests.get(search, auth=login, timeout=20).status_code == 200
    assert requests.get(search, timeout=20).status_code == 401
    assert requests.get(search, auth=("admin", "password1234"), timeout=20).status_code == 401
    assert requests.get(search, auth=login, headers={"Host": "evil.example"}, timeout=20).status_code == 403


def run_pipeline(where: Path, env: dict[str, str]) -> None:
    where.mkdir()
    (where / "images").mkdir()
    paths = {
        "shard": "--images images --shards store:shards",
        "train": "--shards store:shards --initial initial --checkpoint store:checkpoint --curves curves.csv",
        "evaluate": "--shards store:shards --checkpoint store:checkpoint --predictions store:predictions "
        "--confusion confusion.csv --report report.html",
        "register": "--shards store:shards --checkpoint store:checkpoint --predictions store:predictions "
        "--evaluation evaluate.json",
    }
    for stage, flags in paths.items():
        command = [sys.executable, "-m", f"components.{stage}", "--params", str(ROOT / "params.yaml"), *flags.split()]
        done = subprocess.run(
            [*command, "--metrics", f"{stage}.json"], cwd=where, env={**environment(), **env, "OMP_NUM_THREADS": "2"},
            capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "is champion" in done.stderr


def expect_kept(env: dict[str, str]) -> None:
    """Runs and version are in the server, their files in the store, and the model answers."""
    import mlflow

    client = MlflowClient()
    champion = client.get_model_version_by_alias("vgg16-digits", "champion")
    assert str(champion.version) == "1"
    runs = client.search_runs([client.get_experiment_by_name("vgg-imagenet").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    s3 = boto3.Session().client("s3")  # the default session keeps the keys of the store before
    keys = {name: [item["Key"] for item in s3.list_objects_v2(Bucket=name)["Contents"]] for name in ("vgg", "mlflow")}
    assert {"store/shards/manifest.json", "store/checkpoint/manifest.json"} <= set(keys["vgg"])
    assert any(key.endswith("weights.safetensors") for key in keys["mlflow"])
    digits = Digits()
    jpeg = digits.read(digits.originals("val")[0])
    answer = mlflow.pyfunc.load_model("models:/vgg16-digits@champion").predict(pd.DataFrame({"image": [jpeg]}))
    assert answer["classes"][0][0] == digits.originals("val")[0].label


def share_with_dvc(tmp_path: Path, env: dict[str, str], database: Path) -> None:
    """DVC's remote in the same store: push, clone, pull."""
    where = tiny_project(tmp_path / "project", database)
    local = {name: value for name, value in env.items() if name.startswith("AWS_")}
    call(where, "dvc repro", timeout=600)
    call(where, "dvc remote add -d store s3://dvc/vgg")
    call(where, f"dvc remote modify store endpointurl {env['AWS_ENDPOINT_URL']}")
    call(where, "dvc push && git add -A && git commit -qm results", timeout=300, **local)
    call(tmp_path, "git clone -q project colleague")
    shutil.rmtree(where)
    # all outputs are there; the images are not versioned in this project
    assert "changed outs" not in call(tmp_path / "colleague", "dvc pull -q && dvc status", timeout=300, **local)
    assert (tmp_path / "colleague/models/vgg/manifest.json").is_file()
