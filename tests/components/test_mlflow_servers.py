"""MLflow servers as companies run them: every configuration has one message and an exit code that fits."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import flags, program
from mlflow import MlflowClient
from mlflowservers import Front, mlflow_server, private_authority
from s3servers import BUCKET, running_moto
from trainings import run

from components.register.registry import open_registry
from components.report.__main__ import main as report
from components.tracking import artifacts
from components.tracking.__main__ import replay
from components.tracking.access import EXPERIMENT, connect
from components.tracking.tracker import Tracker
from runtime.errors import Problem, Refused, Unreachable, WrongParameters
from runtime.shards.shardset import ShardSet

NOT_FOUND = (  # of Flask, as in the answers recorded from mlflow server 2.22.5
    "<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n<p>The requested URL was not "
    "found on the server. If you entered the URL manually please check your spelling and try again.</p>\n"
)
LOGIN_PAGE = "<html><head><title>Sign in</title><style>a{}</style></head><body><h1>Company login</h1></body></html>"


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("REQUESTS_CA_BUNDLE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")
    for name in [n for n in os.environ if n.startswith(("MLFLOW_", "VGG_")) or n in others]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("VGG_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("VGG_PIPELINE_RUN", "run-1")
    monkeypatch.setattr("components.tracking.tracker.RETRY_SECONDS", 0.2)
    monkeypatch.setattr("components.tracking.tracker.FLUSH_SECONDS", 60.0)


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """Address of a server with --static-prefix /mlflow, without the prefix; it reaches its store, nobody else does."""
    folder, options = tmp_path_factory.mktemp("prefixed"), ("--static-prefix", "/mlflow", "--artifacts-destination")
    with running_moto() as store:
        hidden = store.env(AWS_ENDPOINT_URL="http://objectstore", HTTP_PROXY=store.endpoint)
        with mlflow_server(folder, empty_database, *options, f"s3://{BUCKET}", **hidden) as address:
            yield address


@pytest.fixture(scope="module")
def own_disk(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """A server whose artifact root is a path that exists everywhere, and everywhere is another folder."""
    folder, root = tmp_path_factory.mktemp("own_disk"), "/proc/self/cwd/artifacts"
    allowed = {"MLFLOW_ALLOWED_HOST_ADDRESSED_ARTIFACT_SCHEMES": "abfss"}
    with mlflow_server(
        folder, empty_database, "--no-serve-artifacts", "--default-artifact-root", root, **allowed
    ) as address:
        yield address


def track(address: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> MlflowClient:
    """Track a stage with a metric and an artifact."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    (folder / "page.html").write_text("curves")
    with Tracker("train", "k" * 64, address) as tracker:
        tracker.metrics({"final/top1_error": 0.25})
        tracker.params({"train": {"seed": 1}})
        tracker.artifact(folder / "page.html", "pages")
    return connect()


def run_of_stage(client: MlflowClient, lineage: str) -> Any:
    [experiment] = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    [parent] = client.search_runs([experiment.experiment_id], f"tags.`vgg.lineage` = '{lineage}'")
    [run] = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return run


def assert_tracked(address: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    client = track(address, monkeypatch, folder)
    run = run_of_stage(client, address)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"final/top1_error": 0.25})
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pages")] == ["pages/page.html"]
    assert not list((folder / "journal").iterdir())


def refused(address: str, monkeypatch: pytest.MonkeyPatch, kind: type[Problem] = Refused) -> str:
    """The message with which connect() ends."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(kind) as reason:
        connect()
    assert type(reason.value) is kind, reason.value
    assert "\n" not in str(reason.value)
    return str(reason.value)


def test_a_server_with_a_prefix_and_proxies_in_front(
    prefixed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One test, so that one server is enough."""
    for situation in (
        a_prefix_and_a_slash_at_the_end,
        a_reverse_proxy_with_a_path_and_a_token,
        tls_with_a_private_authority,
        a_host_name_that_the_server_does_not_allow,
        a_store_that_is_slow_and_that_only_the_server_reaches,
    ):
        with monkeypatch.context() as patch:
            situation(prefixed, patch, tmp_path)


def a_prefix_and_a_slash_at_the_end(prefixed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert_tracked(f"{prefixed}/mlflow/", monkeypatch, tmp_path)
    message = refused(prefixed, monkeypatch)
    assert "no MLflow server answers there (status 404" in message
    assert "--static-prefix belongs to the address" in message


def a_reverse_proxy_with_a_path_and_a_token(prefixed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Front(f"{prefixed}/mlflow", path="/tools/tracking", token="letmein") as front:
        message = refused(front.address, monkeypatch)
        assert "refuses the credentials: check MLFLOW_TRACKING_USERNAME" in message
        assert "MLFLOW_TRACKING_TOKEN" in message
        assert "'Unauthorized'" in message
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "letmein")
        assert_tracked(front.address, monkeypatch, tmp_path)


def tls_with_a_private_authority(prefixed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority, certificate = private_authority(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = private_authority(tmp_path / "other")
    with Front(f"{prefixed}/mlflow", certificate=certificate) as front:
        for wrong in (None, other):
            if wrong:
                monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(wrong))
            message = refused(front.address, monkeypatch)
            assert "its certificate is not trusted" in message
            assert "Set MLFLOW_TRACKING_SERVER_CERT_PATH (or REQUESTS_CA_BUNDLE)" in message
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "missing.pem"))
        assert "missing.pem. Check MLFLOW_TRACKING_SERVER_CERT_PATH" in refused(front.address, monkeypatch)
        (tmp_path / "empty.pem").write_text("")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "empty.pem"))
        assert "its certificate is not trusted" in refused(front.address, monkeypatch)
        monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
        assert connect()
        monkeypatch.delenv("REQUESTS_CA_BUNDLE")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority))
        assert_tracked(front.address, monkeypatch, tmp_path)
    with Front(f"{prefixed}/mlflow") as front:
        message = refused(front.address.replace("http:", "https:"), monkeypatch)
        assert "does not speak TLS" in message


def a_host_name_that_the_server_does_not_allow(prefixed: str, monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    with Front(f"{prefixed}/mlflow", host="mlflow.example:5000") as front:
        message = refused(front.address, monkeypatch)
    host = front.address.removeprefix("http://")
    assert "Invalid Host header - possible DNS rebinding attack detected" in message
    assert f"--allowed-hosts '127.0.0.1,{host}'" in message


def a_store_that_is_slow_and_that_only_the_server_reaches(
    prefixed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The files of a model go through the server, however long it takes for them."""
    monkeypatch.setattr("components.tracking.access.REQUEST_SECONDS", 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1")  # weights of 553 MB are above the limit
    (folder := tmp_path / "model").mkdir()
    (folder / "MLmodel").write_text("flavors: {}\n")
    with Front(f"{prefixed}/mlflow", seconds_for_files=1.5) as front:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", front.address)
        client = connect()
        model = client.create_logged_model(client.create_experiment("slow"), "tiny").model_id
        with pytest.raises(Exception, match="timed out"):
            client.log_model_artifacts(model, str(folder))
        with artifacts.transfer():
            client.log_model_artifacts(model, str(folder))
        client.finalize_logged_model(model, "READY")
        found = artifacts.download(f"models:/{model}", str(tmp_path / "found"))
        assert (found / "MLmodel").read_text() == "flavors: {}\n"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ((200, {}, LOGIN_PAGE), Refused, "no MLflow server answers there (status 200: 'Company login')"),
        ((302, {"Location": "https://login.example/?next=1"}, ""), Refused, "redirects to https://login.example"),
        ((403, {}, "<h1>Forbidden</h1>"), Refused, "denies access: check MLFLOW_TRACKING_USERNAME"),
        ((400, {}, "The plain HTTP request was sent to HTTPS port"), Refused, "refuses requests with status 400"),
        ((405, {}, ""), Refused, "refuses requests with status 405: nothing"),
        ((413, {}, "<h1>Request Entity Too Large</h1>"), Refused, "status 413: 'Request Entity Too Large'"),
        ((429, {}, "slow down"), Unreachable, "answers with status 429: 'slow down'"),
        ((502, {}, "<h1>Bad Gateway</h1>"), Unreachable, "answers with status 502: 'Bad Gateway'"),
    ],
)
def test_a_proxy_that_answers_itself(
    answer: tuple[int, dict[str, str], str], kind: type[Problem], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Front(instead=lambda _: answer) as front:
        assert said in refused(front.address, monkeypatch, kind)


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused("http://127.0.0.1:9", monkeypatch, Unreachable)
    assert message == (
        "MLflow at http://127.0.0.1:9 does not answer: [Errno 111] Connection refused. Start it, or set "
        "MLFLOW_TRACKING_URI."
    )
    assert "a..b" in refused("http://a..b:5000", monkeypatch, WrongParameters)
    message = refused("http://user:secret@no-such-host.invalid:5000", monkeypatch, Unreachable)
    assert "MLflow at http://no-such-host.invalid:5000 does not answer" in message
    assert "secret" not in message


def test_the_proxy_of_a_company_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """http_proxy is set on all machines, and knows nothing of a server inside."""
    way = ", asked through the proxy http://{}/ (directly: no_proxy=mlflow.example),"
    with Front(instead=lambda _: (403, {}, "<h1>Blocked by policy</h1>")) as front:
        host = front.address.removeprefix("http://")
        for proxy, kind, said in (
            (host, Refused, "denies access: "),
            ("127.0.0.1:9", Unreachable, "does not answer: "),
        ):
            monkeypatch.setenv("http_proxy", f"http://user:hunter2@{proxy}/")
            message = refused("http://mlflow.example:5000", monkeypatch, kind)
            assert message.startswith(f"MLflow at http://mlflow.example:5000{way.format(proxy)} {said}")
            assert "hunter2" not in message
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "proxy" not in refused("http://127.0.0.1:9", monkeypatch, Unreachable)


@pytest.mark.parametrize(
    ("content", "uri", "kind", "said"),
    [
        ("not a database" * 50, "sqlite:///{file}", Refused, "cannot be used: file is not a database"),
        ("", "sqlite:///{file}/mlflow.db", Refused, "cannot be used: "),
        (
            "",
            "postgresql+nonsense://user:secret@db/mlflow",
            WrongParameters,
            "postgresql+nonsense://db/mlflow: Can't load",
        ),
        ("", "mysql+pymysql://user:secret@db/mlflow", Refused, "mysql+pymysql://db/mlflow needs the Python package"),
    ],
)
def test_a_database_that_cannot_be_used(
    content: str, uri: str, kind: type[Problem], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text(content)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(file=tmp_path / "file"))
    with pytest.raises(kind) as reason, open_registry("tiny") as models:
        models.champion()
    assert said in str(reason.value)
    assert "secret" not in str(reason.value)


def test_the_database_of_a_newer_mlflow(empty_database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
        database.commit()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(Refused, match="'mlflow db upgrade <database_uri>'"), open_registry("tiny") as models:
        models.champion()


@pytest.mark.parametrize(
    ("name", "value", "kind", "said"),
    [
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "many", WrongParameters, "'many' for MLFLOW_HTTP_REQUEST_MAX_RETRIES"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "-1", Refused, "timeout cannot be set to a value less than or equal to 0"),
        ("MLFLOW_TRACKING_AWS_SIGV4", "true", Refused, "needs the Python package requests_auth_aws_sigv4"),
    ],
)
def test_settings_of_the_client_that_cannot_work(
    name: str, value: str, kind: type[Problem], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert said in refused("http://127.0.0.1:9", monkeypatch, kind)


def recorded_2_22(path: str) -> tuple[int, dict[str, str], str]:
    """The answers of a real `mlflow server` 2.22.5, recorded on 2026-11-27."""
    kind = {"Content-Type": "application/json", "Server": "gunicorn"}
    missing = "Could not find experiment with name 'vgg-imagenet'"
    page = {"Content-Type": "text/html; charset=utf-8", "Server": "gunicorn"}
    if path.startswith("/api/2.0/mlflow/experiments/get-by-name"):
        return 404, kind, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": missing})
    return (200, page, "2.22.5") if path == "/version" else (404, page, NOT_FOUND)


def test_a_server_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its API answers as ours until a model is registered."""
    with Front(instead=recorded_2_22) as old:
        message = refused(old.address, monkeypatch)
        assert "is version 2.22.5, which is too old: 3.0 or later is needed" in message
        with Tracker("train", "k" * 64, "lineage") as tracker:  # the stage goes on
            tracker.metrics({"final/top1_error": 0.25})
        assert tracker.journal.pending() > 0
        with pytest.raises(Refused, match="too old"):
            replay(tmp_path / "journal")
        page = tmp_path / "page.md"
        report(["--status", '{"state": "SUCCEEDED"}', "--summary", str(page)])
        assert "Run run-1 succeeded" in page.read_text()


@pytest.mark.faults
def test_artifacts_on_the_disk_of_the_server(
    own_disk: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything but the artifacts arrives; it is said before the work, and nothing is written to this machine."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        client = track(own_disk, monkeypatch, tmp_path)
    run = run_of_stage(client, own_disk)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"final/top1_error": 0.25})
    assert "a folder of the server's own disk, which this machine does not share" in caplog.messages[0]
    assert "without --no-serve-artifacts" in caplog.messages[0]
    assert not (tmp_path / "artifacts").exists()
    with pytest.raises(Refused, match=r"1 event pending in .*: MLflow at .*: files cannot be stored at /proc/self/cwd"):
        replay(tmp_path / "journal")
    [journal] = (tmp_path / "journal").iterdir()
    assert [file.name for file in (journal / "files").iterdir()] == ["page.html"]


@pytest.mark.faults
def test_locations_of_artifacts(own_disk: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that this machine shares with the server is good; a store without its library here is not."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own_disk)
    client, said = connect(), {}
    for location in (str(tmp_path / "shared"), "file:///proc/none", "abfss://a@b.dfs.core.windows.net/c"):
        created = client.create_run(client.create_experiment(location, artifact_location=location)).info.run_id
        try:
            artifacts.check_destination(client, created)
            client.log_text(created, "x", "page.html")
        except Refused as problem:
            said[location] = str(problem)
    assert [path.name for path in (tmp_path / "shared").rglob("*") if path.is_file()] == ["page.html"]
    assert "a folder of the server, and here: [Errno 2] No such file" in said["file:///proc/none"]
    assert "install the package here" in said["abfss://a@b.dfs.core.windows.net/c"]
    assert len(said) == 2


@pytest.mark.faults
def test_no_version_is_registered_whose_files_the_server_cannot_see(
    own_disk: str, shards: ShardSet, params_file: Path, tmp_path: Path
) -> None:
    run(shards, tmp_path / "model", epochs=1)
    done = program("evaluate", *flags("evaluate", tmp_path, params_file), cwd=tmp_path, MLFLOW_TRACKING_URI=own_disk)
    assert done.returncode == 0, done.stderr
    assert "which this machine does not share" in done.stderr
    done = program("register", *flags("register", tmp_path, params_file), cwd=tmp_path, MLFLOW_TRACKING_URI=own_disk)
    assert done.returncode == 78, done.stderr
    assert "error: MLflow at http://127.0.0.1" in done.stderr
    assert "without --no-serve-artifacts, so that it stores them itself, and rename experiment" in done.stderr
    assert MlflowClient(own_disk, own_disk).search_model_versions("name = 'tiny'") == []
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.faults
def test_files_of_a_version_that_the_server_has_lost(
    prefixed: str, shards: ShardSet, params_file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run(shards, tmp_path / "model", epochs=1)

    def stage(name: str) -> str:
        address = f"{prefixed}/mlflow"
        done = program(name, *flags(name, tmp_path, params_file), cwd=tmp_path, MLFLOW_TRACKING_URI=address)
        assert done.returncode == 0, done.stderr
        return done.stderr

    stage("evaluate")
    assert "tiny version 1 is champion\n" in stage("register")
    assert "registered before" in stage("register")
    [files] = tmp_path_factory.getbasetemp().glob("prefixed[0-9]*/a")
    shutil.rmtree(files)
    assert "tiny version 2 is champion\n" in stage("register")
