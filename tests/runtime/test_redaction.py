"""Passwords in addresses and in the texts of libraries are replaced, in everything that a program prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from runtime.redaction import redacted, redacted_values

PASSWORD = "hunter2-and-more"

TEXTS = {
    "GET http://user:hunter2-and-more@host:80/path failed": "GET http://user:***@host:80/path failed",
    "postgresql+psycopg2://vgg:hunter2-and-more@db/mlflow": "postgresql+psycopg2://vgg:***@db/mlflow",
    "mysql://u:p@ss@host and s3://key:secret@bucket/x": "mysql://u:***@host and s3://key:***@bucket/x",
    "https://ghp_0123456789abcdef@github.com/a.git": "https://***@github.com/a.git",
    "('https://b.s3/x?X-Amz-Date=1&X-Amz-Signature=abc123&n=1')": "('https://b.s3/x?X-Amz-Date=1&X-Amz-Signature=***&n=1')",
    "?AWSAccessKeyId=AK&Signature=a%2Fb%3D&Expires=9": "?AWSAccessKeyId=***&Signature=***&Expires=9",
    "https://x.blob/y?sv=2&sig=abc%3D": "https://x.blob/y?sv=2&sig=***",
    "postgresql://db/x?user=u&password=hunter2": "postgresql://db/x?user=u&password=***",
    'connection to "host=db user=u password=hunter2 dbname=x" failed': (
        'connection to "host=db user=u password=*** dbname=x" failed'
    ),
    "{'Authorization': 'Basic dTpw', 'Accept': '*/*'}": "{'Authorization': 'Basic ***', 'Accept': '*/*'}",
    "Authorization: Bearer abc.def-ghi": "Authorization: Bearer ***",
    "token Bearer 0123456789abcdef0123": "token Bearer ***",
    # nothing secret
    "s3://bucket/prefix@v2, a@b.example, git@github.com:a/b": None,
    "http://host:8080/x?epoch=3&key=a": None,
    "the bearer of bad news; password: see MLFLOW_TRACKING_PASSWORD": None,
    "sqlite:////home/u/mlflow.db": None,
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text: str) -> None:
    assert redacted(text) == (TEXTS[text] or text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    ("variable", "value", "secret"),
    [
        ("MLFLOW_TRACKING_PASSWORD", PASSWORD, PASSWORD),
        ("MLFLOW_TRACKING_TOKEN", PASSWORD, PASSWORD),
        ("AWS_SECRET_ACCESS_KEY", "abc/def+ghi=", "abc/def+ghi="),
        ("AWS_SECRET_ACCESS_KEY", "abc/def+ghi=", "abc%2Fdef%2Bghi%3D"),
        ("AWS_SESSION_TOKEN", PASSWORD, PASSWORD),
        ("PGPASSWORD", PASSWORD, PASSWORD),
        ("KF_PIPELINES_COOKIES", "a=1; session=0123456789", "0123456789"),
        ("MLFLOW_TRACKING_URI", f"http://user:{PASSWORD}@host", PASSWORD),
        ("HTTPS_PROXY", "http://user:a%40b-c%2Fd@proxy:3128", "a@b-c/d"),
        ("ANY_ADDRESS", "http://user:pa/ss#word-1@host", "word-1"),
        ("ANY_ADDRESS", "http://user:first-part/ss@host", "first-part"),
    ],
)
def test_secrets_of_the_environment(variable: str, value: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    assert secret not in redacted(f"Port could not be cast to integer value as '{secret}' (in {secret!r})")
    assert redacted_values({"a": [f"x{secret}", 1, None]}) == {"a": ["x***", 1, None]}


def test_files_and_switches_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("KF_PIPELINES_SA_TOKEN_PATH", "/var/run/token"), ("TOKENIZERS_PARALLELISM", "disabled"),
        ("DATABASE", "postgresql://postgres@db/mlflow"), ("SOME_TOKEN", "yes"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    text = "/var/run/token of postgres is disabled, yes"
    assert redacted(text) == text


def test_prints_logs_warnings_and_tracebacks(tmp_path: Path) -> None:
    """Also of code that knows nothing of it."""
    script = f"""
import logging, threading, warnings
from components import program
secret = "{PASSWORD}"
def work():
    print("printed", secret)
    logging.getLogger("library").warning("logged %s", secret)
    warnings.warn(secret)
    thread = threading.Thread(target=lambda: 1 / 0 if secret else 0, name=secret)
    thread.start(); thread.join()
    raise RuntimeError(f"http://user:{{secret}}@host")
program.run(work)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(X_PASSWORD=PASSWORD), cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert PASSWORD not in done.stdout + done.stderr
    assert "printed ***" in done.stdout
    assert "logged ***" in done.stderr
    assert "http://user:***@host" in done.stderr


def test_every_program_goes_through_run() -> None:
    """program.run redacts; what does not use it prints no address and quotes no library."""
    harmless = {"vgg/params/__main__.py", "vgg/training/trouble.py", "components/classify/answering.py"}
    others = set()
    for root in ("components", "pipelines", "vgg", "security"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                    called = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
                    if not called & {"program.run", "run"}:
                        others.add(str(path.relative_to(ROOT)))
    assert others == harmless
