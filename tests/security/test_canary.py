"""A secret is found in every encoding and archive, and in none of our outputs."""

from __future__ import annotations

import base64
import gzip
import io
import json
import secrets
import subprocess
import sys
import tarfile
import urllib.parse
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import s3servers
from conftest import ROOT, environment, executor_input, flags, program
from mlflowserver import server
from ports import free_port

from runtime.errors import BadData, Refused, WrongParameters
from security import canary
from security.canary import CHUNK, find

SECRET = 'AKIA"CANARY/+ é=1'


@pytest.mark.parametrize(
    "write, form",
    [
        (lambda s: s.encode(), "as it is"),
        (lambda s: urllib.parse.quote(s, safe="").encode(), "percent-encoded"),
        (lambda s: urllib.parse.quote(s).encode(), "percent-encoded, slashes kept"),
        (lambda s: json.dumps(s).encode(), "escaped for JSON"),
        (lambda s: s.encode().hex().encode(), "hexadecimal"),
        (lambda s: s.encode().hex().upper().encode(), "hexadecimal, upper case"),
        (lambda s: base64.b64encode(s.encode()), "base64, offset 0"),
        (lambda s: base64.b64encode(f"u:{s}".encode()), "base64, offset 2"),
        (lambda s: base64.b64encode(f"user:{s} and more".encode()), "base64, offset 2"),
        (lambda s: base64.b64encode(f"user{s} and more".encode()), "base64, offset 1"),
        (lambda s: base64.urlsafe_b64encode(f"use{s}...".encode()), "base64"),
    ],
)
def test_every_form_is_found(write: Callable[[str], bytes], form: str) -> None:
    data = b"before " + write(SECRET) + b" after"
    assert any(line.startswith(f"x: {form}") for line in find(SECRET, ("x", data))), find(SECRET, ("x", data))
    other = SECRET.replace("CANARY", "CANARO")
    assert find(other, ("x", data)) == []


def test_base64_is_found_at_every_offset_and_length() -> None:
    for length in range(12, 16):
        secret = secrets.token_urlsafe(30)[:length]
        for before in range(7):
            for after in range(4):
                data = base64.b64encode(b"a" * before + secret.encode() + b"z" * after)
                assert find(secret, ("x", data)), (secret, before, after)


def test_it_is_found_across_the_ends_of_what_is_read_at_once() -> None:
    for start in (0, CHUNK - 1, CHUNK - len(SECRET.encode()), CHUNK, 2 * CHUNK - 5):
        assert find(SECRET, ("x", b"-" * start + SECRET.encode() + b"-" * 9)) == ["x: as it is"]


def test_folders_names_links_and_archives_are_looked_into(tmp_path: Path) -> None:
    secret = "canary-of-a-file-name"
    files = tmp_path / "files"
    files.mkdir()
    (files / "harmless.txt").write_text("nothing")
    (files / "plain.txt").write_text(f"key = {secret}\n")
    (files / f"{secret}.log").write_text("")
    (files / "link").symlink_to(f"/nowhere/{secret}")
    (files / "log.gz").write_bytes(gzip.compress(secret.encode() * 2))
    with zipfile.ZipFile(files / "wheel.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.py", secret * 3)
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(files / "plain.txt", "etc/secret")
    with tarfile.open(files / "image.tar", "w") as tar:
        for name, data in (("layer.tar", layer.getvalue()), ("layer.tar.gz", gzip.compress(layer.getvalue()))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (files / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    (files / "cut.zip").write_bytes((files / "wheel.zip").read_bytes()[:60])
    found = {line.removeprefix(f"{files}/") for line in find(secret, files)}
    assert found == {
        "plain.txt: as it is",
        f"{secret}.log (its name): as it is",
        "link: as it is",
        "log.gz (unpacked): as it is",
        "wheel.zip: a/b.py: as it is",
        "image.tar: as it is",
        "image.tar: layer.tar.gz (unpacked): as it is",
    }


def test_the_program_names_the_place_and_not_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CANARY", "canary-0123456789")
    (tmp_path / "a.txt").write_text("nothing")
    canary.main(["--env", "CANARY", str(tmp_path)])
    assert "CANARY: not found in" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text("canary-0123456789")
    with pytest.raises(Refused, match=r"CANARY: .*b\.txt: as it is") as refused:
        canary.main(["--env", "CANARY", str(tmp_path)])
    assert "0123456789" not in str(refused.value)
    with pytest.raises(BadData, match="does not exist"):
        canary.main(["--env", "CANARY", str(tmp_path / "c")])
    with pytest.raises(WrongParameters, match="--env OTHER: is not set"):
        canary.main(["--env", "OTHER", str(tmp_path)])
    with pytest.raises(WrongParameters, match="at least 12 bytes"):
        find("short", tmp_path)


# --- and nowhere in what we write

CANARIES = {
    name: f"canary-{secrets.token_hex(12)}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "KF_PIPELINES_TOKEN")
}


IN_ADDRESSES = {
    name: f"canary-{secrets.token_hex(12)}"
    for name in ("tracking", "database", "store", "endpoint", "proxy", "pipelines", "presigned")
}
ADDRESSES = {  # nothing listens on port 9
    "VGG_STORE": f"s3://user:{IN_ADDRESSES['store']}@bucket/prefix",
    "AWS_ENDPOINT_URL": f"http://user:{IN_ADDRESSES['endpoint']}@127.0.0.1:9",
    "KF_PIPELINES_ENDPOINT": f"http://user:{IN_ADDRESSES['pipelines']}@127.0.0.1:9",
    "HTTP_PROXY": f"http://user:{IN_ADDRESSES['proxy']}@127.0.0.1:9",
    "HTTPS_PROXY": f"http://user:{IN_ADDRESSES['proxy']}@127.0.0.1:9",
}


def nowhere(*places: Path | tuple[str, bytes]) -> None:
    every = [*CANARIES.values(), *IN_ADDRESSES.values()]
    assert [line for secret in every for line in find(secret, *places)] == []


def outputs(*runs: subprocess.CompletedProcess[str]) -> list[tuple[str, bytes]]:
    return [(" ".join(run.args[2:4]), (run.stdout + run.stderr).encode()) for run in runs]


def test_the_compiled_pipeline_holds_no_secret(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.submit", "--compile", str(tmp_path / "pipeline.yaml")],
        cwd=ROOT, env=environment(**CANARIES, **ADDRESSES), capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    nowhere(tmp_path, ("stdout", done.stdout), ("stderr", done.stderr))


def test_shards_logs_and_tracking_hold_no_secret(
    tmp_path: Path, params_file: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the canary as the store's key, and once with a wrong key."""
    monkeypatch.setattr(s3servers, "KEY", CANARIES["AWS_ACCESS_KEY_ID"])
    monkeypatch.setattr(s3servers, "SECRET", CANARIES["AWS_SECRET_ACCESS_KEY"])
    with s3servers.running_rclone(tmp_path / "s3") as store:
        address = f"s3://{s3servers.BUCKET}/shards"
        words = flags("shard", tmp_path, params_file)
        words[words.index("--shards") + 1] = address
        env = store.env(**CANARIES, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
        done = program("shard", *words, cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "s3").rglob("*.tar"))
        wrong = env | {"AWS_SECRET_ACCESS_KEY": CANARIES["KF_PIPELINES_TOKEN"]}
        refused = program("shard", *words, cwd=tmp_path, **wrong)
        assert refused.returncode not in (0, 1), refused.stderr
    nowhere(tmp_path, *outputs(done, refused))


def tracking_address(host: str) -> str:
    return f"http://user:{IN_ADDRESSES['tracking']}@{host}"


def test_passwords_in_addresses_of_services_that_are_down(tmp_path: Path, params_file: Path, images: Path) -> None:
    """Every message quotes the address; the stage itself succeeds with tracking down."""
    signed = f"https://bucket.example/x?X-Amz-Date=1&X-Amz-Signature={IN_ADDRESSES['presigned']}"
    env = {
        **CANARIES, **ADDRESSES, "AWS_REGION": "us-east-1", "VGG_S3_PATIENCE_SECONDS": "0.2", "no_proxy": "",
        "MLFLOW_TRACKING_URI": tracking_address("127.0.0.1:9"),
    }  # fmt: skip
    database = {**env, "MLFLOW_TRACKING_URI": f"postgresql://user:{IN_ADDRESSES['database']}@127.0.0.1:9/mlflow"}
    words = flags("shard", tmp_path, params_file)

    def instead(old: Path, new: str) -> list[object]:
        return [new if word == old else word for word in words]

    shard, images_folder, store = words, tmp_path / "images", tmp_path / "shards"
    kubeflow = ["--executor-input", executor_input(tmp_path / "executor.json")]
    done = program("shard", *shard, *kubeflow, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert "events pending" in done.stderr
    failed = {
        "a signed address": program("shard", *instead(images_folder, signed), cwd=tmp_path, **env),
        "a store": program("shard", *instead(store, "s3://bucket/shards"), cwd=tmp_path, **env),
        "a store with a password": program("shard", *instead(store, "store:shards"), cwd=tmp_path, **env),
        "replay": program("tracking", "replay", cwd=tmp_path, **env),
        "replay into a database": program("tracking", "replay", cwd=tmp_path, **database),
    }
    for name, run in failed.items():
        assert run.returncode in (64, 69, 78), f"{name}: {run.stderr}"  # 78: no driver for that database here
        assert "127.0.0.1:9" in run.stderr or "***" in run.stderr, f"{name} does not name the address: {run.stderr}"
        assert "Traceback" not in run.stderr, f"{name}: {run.stderr}"
    submit = subprocess.run(
        [sys.executable, "-m", "pipelines.submit", "--params", str(params_file)],
        cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert submit.returncode == 64
    nowhere(tmp_path, *outputs(done, submit, *failed.values()))


@pytest.mark.faults
def test_the_password_of_a_tracking_server_that_answers(
    tmp_path: Path, params_file: Path, images: Path, empty_database: Path
) -> None:
    """All stages and the report: in no file, artifact, database row or output for Kubeflow."""
    port, runs = free_port(), []
    (tmp_path / "server").mkdir()
    env = {**CANARIES, "MLFLOW_TRACKING_URI": tracking_address(f"127.0.0.1:{port}"), "VGG_PIPELINE_RUN": "run-1"}
    del env["MLFLOW_TRACKING_PASSWORD"]
    with server(tmp_path / "server", port, empty_database):
        for stage in ("shard", "train", "evaluate", "register"):
            kubeflow = ["--executor-input", executor_input(tmp_path / f"{stage}-executor.json")]
            runs.append(program(stage, *flags(stage, tmp_path, params_file), *kubeflow, cwd=tmp_path, **env))
            assert runs[-1].returncode == 0, runs[-1].stderr
        status = json.dumps({"state": "FAILED", "error": {"message": f"failed at {env['MLFLOW_TRACKING_URI']}"}})
        words = ["--status", status, "--summary", tmp_path / "page.md"]
        runs.append(
            program("report", *words, *["--executor-input", executor_input(tmp_path / "r.json")], cwd=tmp_path, **env)
        )
        assert runs[-1].returncode == 0, runs[-1].stderr
    assert "user:***@127.0.0.1" in (tmp_path / "page.md").read_text()
    assert list((tmp_path / "server/artifacts").rglob("MLmodel"))
    nowhere(tmp_path, *outputs(*runs))
