"""One writer on a prefix: with a store that has conditional writes, and with one that ignores them."""

# fixtures

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import environment
from faultproxy import FaultProxy
from s3servers import Server, address, moto, moto_server, rclone_server, use  # noqa: F401

from runtime.errors import Preempted, Unreachable
from runtime.store.lease import LEASE, Lease
from runtime.store.s3 import Prefix


@pytest.fixture(params=["moto", pytest.param("rclone", marks=pytest.mark.faults)])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    found: Server = request.getfixturevalue(f"{request.param}_server")
    use(monkeypatch, found)
    return found


def test_one_of_eight_simultaneous_writers_holds_the_prefix(store: Server, address: str) -> None:
    together, outcomes = threading.Barrier(8), Counter[str]()

    def contend(number: int) -> None:
        prefix = Prefix(address)
        prefix.head("x")
        together.wait(30)
        try:
            with Lease(prefix, f"writer {number}", expiry=8) as lease:
                lease.check()
                outcomes["held"] += 1
                together.wait(30)
                lease.check()
        except Preempted as reason:
            assert "writer" in str(reason)
            outcomes["preempted"] += 1
            together.wait(30)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(contend, range(8)))
    assert outcomes == {"held": 1, "preempted": 7}
    with Lease(Prefix(address), "the next") as lease:  # the first has ended and deleted its lease
        with pytest.raises(Preempted, match="the next is writing there"), Lease(Prefix(address), "another"):
            pass
        lease.check()
    assert Prefix(address).get(LEASE) is None


HOLD = """
import sys, time
from runtime.store.lease import Lease
from runtime.store.s3 import Prefix
with Lease(Prefix(sys.argv[1]), "the killed one", expiry=3):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_is_followed_after_the_expiry(store: Server, address: str) -> None:
    env = environment(**{name: value for name, value in os.environ.items() if name.startswith(("AWS_", "VGG_"))})
    holder = subprocess.Popen([sys.executable, "-c", HOLD, address], env=env, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    time.sleep(3.5)  # longer than the expiry, so it was renewed
    with pytest.raises(Preempted, match="the killed one is writing there"), Lease(Prefix(address), "me", expiry=3):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    began = time.monotonic()
    while True:
        try:
            with Lease(Prefix(address), "me", expiry=3) as lease:
                lease.check()
                break
        except Preempted:
            assert time.monotonic() - began < 10
            time.sleep(0.2)
    assert time.monotonic() - began > 1


def test_a_lost_lease_is_noticed(store: Server, address: str) -> None:
    with Lease(Prefix(address), "me", expiry=2) as lease:
        Prefix(address).put_bytes(LEASE, b'{"owner": "a usurper", "token": "1"}')
        time.sleep(1.5)
        with pytest.raises(Preempted, match="a usurper is writing there"):
            lease.check()
    assert b"usurper" in (Prefix(address).get(LEASE) or b"")  # no longer ours, so not deleted


def test_a_lease_that_cannot_be_renewed_expires(moto: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(moto.endpoint, kinds=("unavailable",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(Unreachable), Lease(Prefix(address), "me", expiry=2) as lease:
            lease.check()
            proxy.probability = 1
            time.sleep(2.5)
            with pytest.raises(Preempted, match="could not be renewed"):
                lease.check()
            raise Unreachable("ends the run without another wait at the exit")


def test_a_lease_is_taken_once_through_faults(moto: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Applied but answered with 500: the second try finds its own lease."""
    monkeypatch.setattr("runtime.retry.FIRST_PAUSE", 0.02)
    with FaultProxy(moto.endpoint, seed=5, probability=0.5, kinds=("late", "reset", "unavailable")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for turn in range(3):
            with Lease(Prefix(address), f"turn {turn}", expiry=2) as lease:
                time.sleep(0.7)
                lease.check()
        assert proxy.injected["late"]


def test_a_store_that_refuses_conditions_gets_none(moto: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(moto.endpoint, probability=1, kinds=("unknown",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with Lease(Prefix(address), "me", expiry=2) as lease:
            time.sleep(1.2)
            lease.check()
            with pytest.raises(Preempted, match="me is writing there"), Lease(Prefix(address), "another"):
                pass
        assert proxy.injected["unknown"] == 1 and Prefix(address).get(LEASE) is None
