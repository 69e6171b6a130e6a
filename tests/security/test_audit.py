"""The audit of dependencies: the real pip-audit with a local advisory service."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from runtime.errors import BadData, Refused, Unreachable
from security import audit

HASH = f"--hash=sha256:{'0' * 64}"
LOCK = f"""\
numpy==2.5.1 \\
    {HASH}
    # via pillow
pillow==13.0.0 \\
    {HASH} \\
    {HASH}
Ruamel_yaml[jinja2]==0.19.1 {HASH}
"""


def advisory(name: str, identity: str, *aliases: str) -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}]
    affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": ranges}]
    return {"id": identity, "aliases": list(aliases), "summary": "bad", "affected": affected}


class Service(ThreadingHTTPServer):
    """Has OSV's query API.  known: advisories by package.  asked: packages.  broken_after: requests, then only 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.known = {"mlflow": [advisory("mlflow", "GHSA-known")]}
        self.asked = list[str]()
        self.broken_after: int | None = None
        self.url = f"http://127.0.0.1:{self.server_port}/v1/query"


class Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.server.asked.append(f"{name} {query['version']}")
        broken = self.server.broken_after is not None and len(self.server.asked) > self.server.broken_after
        body = json.dumps({"vulns": self.server.known[name]} if name in self.server.known else {}).encode()
        self.send_response(503 if broken else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(5)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "some.lock"
    path.write_text(LOCK)
    return path


def waivers(tmp_path: Path, **changes: Any) -> str:
    entry = {"id": "CVE-1", "package": "pillow", "reason": "fonts are not used", "until": "2099-01-01", **changes}
    path = tmp_path / "waivers.yaml"
    path.write_text("- " + "\n  ".join(f"{key}: {value}" for key, value in entry.items()) + "\n")
    return str(path)


def soon(days: int) -> str:
    return str(datetime.date.today() + datetime.timedelta(days))


@pytest.mark.faults
def test_every_package_of_our_lock_is_looked_up(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.known = {"mlflow": [advisory("mlflow", "GHSA-known")]}
    with pytest.raises(Refused, match=r"mlflow 3\.17\.2: GHSA-known") as refused:
        audit.main(["--service", service.url])
    assert str(refused.value).count("fixed in") == 1
    packages = audit.locked(ROOT / "requirements.lock")
    assert len(packages) > 200
    assert {f"{name} {version}" for name, version in packages} == set(service.asked[1:])


def test_an_advisory_fails_unless_waived(
    service: Service, lock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit.main(["--service", service.url, str(lock)])
    assert capsys.readouterr().out == "pip-audit: some.lock: passed, 3 packages looked up, 0 advisories waived\n"
    assert set(service.asked[1:]) == {"numpy 2.5.1", "pillow 13.0.0", "ruamel-yaml 0.19.1"}
    service.known["pillow"] = [advisory("pillow", "GHSA-a", "CVE-1")]
    with pytest.raises(Refused, match=r"pillow 13\.0\.0: CVE-1, GHSA-a; fixed in: 99\.1"):
        audit.main(["--service", service.url, str(lock)])
    for wrong in ({"id": "CVE-2"}, {"package": "numpy"}):
        with pytest.raises(Refused, match="CVE-1"):
            audit.main(["--service", service.url, "--waivers", waivers(tmp_path, until=soon(9), **wrong), str(lock)])
    audit.main(["--service", service.url, "--waivers", waivers(tmp_path, until=soon(0)), str(lock)])
    assert "3 packages looked up, 1 advisories waived" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"until": soon(-1)}, "expired on"),
        ({"until": soon(400)}, "more than a year away"),
        ({"until": "some day"}, "must be a date"),
        ({"reason": "''"}, "'reason' a sentence"),
        ({"note": "x"}, "must have exactly id, package, reason, until"),
    ],
)
def test_a_waiver_has_a_reason_and_an_end(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=message):
        audit.main(["--waivers", waivers(tmp_path, **changes)])


def test_our_waivers_are_valid() -> None:
    audit.read_waivers(ROOT / "security/waivers.yaml", datetime.date.today())


def not_run(url: str, lock: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    audit.main(["--service", url, str(lock)])
    out = capsys.readouterr().out
    assert out.startswith("pip-audit: not run (")
    assert message in out
    assert "passed" not in out
    with pytest.raises(Unreachable, match="not run"):
        audit.main(["--service", url, "--must-run", str(lock)])


def test_not_run_if_the_service_is_unreachable(
    service: Service, lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.broken_after = 0
    not_run(service.url, lock, "answered 503", capsys)
    service.broken_after = None
    not_run(service.url.replace(str(service.server_port), "1"), lock, "refused", capsys)


def test_not_run_if_the_service_fails_during_the_audit(
    service: Service, lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.broken_after = 2
    audit.main(["--service", service.url, str(lock)])
    assert capsys.readouterr().out.startswith("pip-audit: not run (")


def test_a_mirror_without_advisories_is_not_trusted(
    service: Service, lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.known.clear()
    not_run(service.url, lock, "cannot be trusted", capsys)


def test_a_package_that_was_not_looked_up_is_a_failure(
    service: Service, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = audit.look_up
    monkeypatch.setattr(audit, "look_up", lambda *given: [p for p in whole(*given) if p["name"] != "numpy"])
    with pytest.raises(Refused, match=r"1 of 3 were not looked up: numpy 2\.5\.1"):
        audit.main(["--service", service.url, str(lock)])


@pytest.mark.parametrize("text", ["numpy==2.5.1\n", f"numpy>=2 {HASH}\n", "", f"numpy @ https://x/y.whl {HASH}\n"])
def test_a_lock_without_pins_or_hashes_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.lock"
    path.write_text(text)
    with pytest.raises(BadData, match=r"some\.lock"):
        audit.locked(path)
