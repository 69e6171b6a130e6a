"""Lineage and doctor with an object store: content at the addresses of the runs, writers with a lease."""

import os
import socket
from pathlib import Path

import pytest
from chain import flip
from s3servers import Server, address, moto, moto_server  # noqa: F401

from components.doctor import writers
from components.doctor.finding import Patient
from components.lineage.links import DATA, Link
from components.lineage.places import Locator, at
from components.lineage.verify import DAMAGED, VERIFIED, verify
from runtime.shards.shardset import ShardSet
from runtime.store.lease import Lease, this_process
from runtime.store.s3 import Prefix

pytestmark = pytest.mark.faults


def test_content_in_a_store(
    moto: Server,
    address: str,
    shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def upload() -> None:
        for path in shards.directory.iterdir():
            Prefix(f"{address}/shards/a").put_bytes(path.name, path.read_bytes())

    monkeypatch.setenv("VGG_STORE", address)
    upload()
    locator = Locator(tmp_path / "elsewhere")
    [place] = locator.find(shards.digest, ("store:shards/b", f"store:shards/a#{shards.digest}"))
    assert place.address == f"{address}/shards/a"
    link = Link(DATA, shards.digest, shards.digest, places=[place])
    verify(link, None, locator)
    assert link.state == VERIFIED
    flip(shards.directory / "train-00001.tar", 700)
    upload()
    verify(link, None, locator)
    assert link.state == DAMAGED
    assert f"{address}/shards/a: train-00001.tar" in link.findings[0]
    assert at(f"{address}/shards/b") is None


def test_a_lease(moto: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGG_STORE", address)
    assert list(writers.check(Patient(tmp_path, deep=False))) == []
    with Lease(Prefix(f"{address}/shards/a"), this_process()):
        [finding] = writers.check(Patient(tmp_path, deep=False))
    assert finding.what == f"{address}/shards/a: process {os.getpid()} of {socket.gethostname()} is at work there"
    assert finding.exit_code == 75
    assert list(writers.check(Patient(tmp_path, deep=False))) == []
