"""The proof of an installation: the real program against fakes of Kubeflow, Kubernetes and a registry over real HTTP.

What the fakes cannot do (policies, pods that meet, a served model) is canned in tests/fakes/provingworld.py: these
tests hold that the checks see what is wrong, not that an installation works.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from ending import ended
from kfpserver import Fault, KfpServer
from kfpworld import CANARIES, package, prepare  # noqa: F401
from kubelive import LiveObjects
from kubeobjects import ImageRegistry
from provingworld import Installation

from pipelines.definition.package import Package
from pipelines.prove import __main__ as prove
from pipelines.prove import losses
from pipelines.prove.report import FAILED, NOT_TRIED, OK, Report, Row
from pipelines.prove.table import CHECKS
from runtime.errors import Preempted, Refused, Unreachable, WrongParameters
from runtime.stopping import StopRequested


@dataclass
class World:
    kfp: KfpServer
    kube: LiveObjects
    cluster: Installation
    flags: list[str]
    output: Path
    capsys: pytest.CaptureFixture[str]
    caplog: pytest.LogCaptureFixture

    def prove(self, *flags: str) -> dict[str, ElementTree.Element]:
        """Test cases of the JUnit file, by name.  A Problem is raised again."""
        self.caplog.clear()
        try:
            prove.main([*self.flags, *flags])
        finally:
            said = self.capsys.readouterr().out + self.caplog.text
            said += "".join(path.read_text() for path in self.output.glob("prove.*"))
            assert not [canary for canary in CANARIES if canary in said]
            assert not self.kfp.surprises and not self.kube.surprises
        return self.cases()

    def cases(self) -> dict[str, ElementTree.Element]:
        return {case.attrib["name"]: case for case in ElementTree.parse(self.output / "prove.xml").iter("testcase")}

    def states(self) -> dict[str, str]:
        kinds = {"failure": FAILED, "skipped": NOT_TRIED, "system-out": OK}
        return {name: kinds[case[0].tag] for name, case in self.cases().items()}

    def seen(self, check: str) -> str:
        return str(self.cases()[check][0].text)

    def expect_nothing_left(self) -> None:
        assert self.kfp.runs == self.kfp.experiments == self.kfp.versions == self.kfp.pipelines == []
        assert not self.kube.pods
        assert list(self.kube.config_maps()) == ["vgg-addresses"]
        assert not list(self.cluster.store.iterdir())


@pytest.fixture
def world(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[World]:
    """A complete installation on which everything works, with its images in a registry."""
    prepare(package, monkeypatch, caplog)
    store = tmp_path / "store"
    store.mkdir()
    with KfpServer() as kfp, LiveObjects() as kube, ImageRegistry() as registry:
        kube.complete()
        kube.nodes(a={}, b={})
        addresses = {"VGG_STORE": str(store), "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
        kube.put("configmaps/vgg-addresses", data=addresses)
        monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(registry.auth_file(tmp_path / "auth.json")))
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kfp.endpoint)
        metrics = json.loads((ROOT / "metrics/evaluate.json").read_bytes())
        flags = ["--output", str(tmp_path / "out"), "--poll", "0.01", "--patience", "30"]
        for name in package.images:
            registry.push(f"vgg/{name}:1")
            flags += ["-C", f"{name}={registry.host}/vgg/{name}:1"]
        yield World(kfp, kube, Installation(kfp, kube, store, metrics), flags, tmp_path / "out", capsys, caplog)


def test_an_installation_on_which_everything_works(world: World) -> None:
    world.prove()
    assert world.states() == {check.name: OK for check in CHECKS}
    world.expect_nothing_left()
    assert "296 images, top-1 error 1.01% (committed 1.01%), the same shards" in world.seen("metrics")
    assert "train found the finished training of 470 steps" in world.seen("again")
    assert "continued at step 40" in world.seen("pod deleted")
    assert "Secret prove-" in world.seen("missing secret")
    assert "says nothing, as no pod reaches them: 169.254.169.254:80" in world.seen("policies")
    markdown = (world.output / "prove.md").read_text()
    assert all(f"| {OK} | {check.name} | {check.expected} |" in markdown for check in CHECKS)
    [removed] = world.cluster.removed
    assert len(removed["lineages"]) == 6 and removed["models"] == [removed["name"], f"{removed['name']}-short"]


@pytest.mark.parametrize(
    ("change", "failed", "said"),
    [
        ({"top1_error": 0.05}, "metrics", "top-1 error 5.00% (committed 1.01%)"),
        pytest.param({"num_images": 295}, "metrics", "295 images", marks=pytest.mark.faults),
        pytest.param({"data_digest": "0.dir"}, "metrics", "other shards: 0.dir", marks=pytest.mark.faults),
    ],
)
def test_other_metrics_than_the_committed_ones(change: dict[str, Any], failed: str, said: str, world: World) -> None:
    world.cluster.metrics |= change
    with pytest.raises(prove.NotProved, match=f"failed: {failed}") as caught:
        world.prove("--only", "preflight,digits,metrics")
    assert caught.value.exit_code == 1
    assert world.states() == {"preflight": OK, "digits": OK, "metrics": FAILED}
    assert said in world.seen("metrics")
    world.expect_nothing_left()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("forgets", "states", "said"),
    [
        ("cache", {"again": FAILED, "one parameter": FAILED}, "shard and evaluate ran again"),
        ("checkpoints", {"pod deleted": FAILED}, "does not say that it continued from a checkpoint"),
        ("gate", {"digits": FAILED, "metrics": NOT_TRIED, "served": NOT_TRIED}, "without a pod of register"),
    ],
)
def test_what_does_not_work_is_seen(forgets: str, states: dict[str, str], said: str, world: World) -> None:
    world.cluster.forgets = {forgets}
    names = ["preflight", "digits", *(name for name in states if name != "digits")]
    with pytest.raises(prove.NotProved):
        world.prove("--only", ",".join(names))
    assert world.states() == {"preflight": OK, "digits": OK, **states}
    assert said in world.seen(next(iter(states)))
    if forgets == "gate":
        assert "because digits failed" in world.seen("metrics")
    world.expect_nothing_left()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("opened", "closed", "said"),
    [
        ({"10.9.8.7:9999"}, set(), "a step reaches 10.9.8.7:9999, which it must not"),
        (set(), {"mlflow:5000"}, "a step does not reach mlflow:5000 (no answer in 5 s)"),
    ],
)
def test_policies_that_are_not_as_they_should_be(opened: set[str], closed: set[str], said: str, world: World) -> None:
    """What the pods see is canned: no fake enforces a policy."""
    world.cluster.reaches[True] = (world.cluster.reaches[True] | opened) - closed
    with pytest.raises(prove.NotProved):
        world.prove("--only", "preflight,policies")
    assert said in world.seen("policies")


@pytest.mark.faults
def test_policies_prove_nothing_where_no_pod_reaches_another(world: World) -> None:
    world.cluster.reaches[False].discard("10.9.8.7:9999")
    world.prove("--only", "preflight,policies")
    assert world.states()["policies"] == NOT_TRIED


def test_without_trainer_several_nodes_are_not_tried(world: World) -> None:
    world.kube.put("/apis/trainer.kubeflow.org/v1alpha1", resources=[])
    world.prove("--only", "preflight,several nodes,node deleted")
    assert world.states() == {"preflight": OK, "several nodes": NOT_TRIED, "node deleted": NOT_TRIED}
    assert "the cluster serves no TrainJobs" in world.seen("several nodes")
    assert "because several nodes was not tried" in world.seen("node deleted")
    assert not world.kube.made


def test_without_a_permission_its_checks_are_not_tried(world: World) -> None:
    world.kube.denied = {"delete pods", "create pods"}
    world.prove("--only", "preflight,digits,metrics,pod deleted,policies")
    tried = {"preflight": OK, "digits": OK, "metrics": NOT_TRIED, "pod deleted": NOT_TRIED, "policies": NOT_TRIED}
    assert world.states() == tried
    assert "no permission to create pods in namespace kubeflow" in world.seen("metrics")
    left = (world.output / "prove.md").read_text()
    assert "left behind: in the store prove-" in left and "no permission to create pods" in left


def test_wrong_surroundings_are_one_message_and_nothing_is_made(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world.kube.denied = {"create configmaps"}
    with pytest.raises(Refused, match=r"no permission in namespace kubeflow .* to create configmaps") as refused:
        world.prove()
    assert refused.value.exit_code == 78
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(Unreachable, match="no Kubernetes access") as unreachable:
        world.prove()
    assert unreachable.value.exit_code == 69
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="no answer"):
        prove.main(["--patience", "0.2"])
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    for flags, words in (
        ([], "set KF_PIPELINES_ENDPOINT"), (["--only", "digit"], "no check digit"), (["--clean", "x"], "begins with"),
    ):  # fmt: skip
        with pytest.raises(WrongParameters, match=words):
            prove.main(flags)
    assert not world.kube.made and not world.kfp.runs


def test_an_interrupt_removes_what_was_made_and_still_prints_the_table(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = losses.Bench.training_under_way

    def interrupted(bench: Any, run_id: str) -> Any:
        under_way(bench, run_id)
        raise StopRequested  # what the handler of the signal raises

    monkeypatch.setattr(losses.Bench, "training_under_way", interrupted)
    with pytest.raises(Preempted):
        world.prove("--only", "preflight,pod deleted,policies")
    assert world.states() == {"preflight": OK, "pod deleted": NOT_TRIED, "policies": NOT_TRIED}
    assert "because of an interrupt" in world.seen("pod deleted")
    world.expect_nothing_left()


@pytest.mark.faults
def test_a_real_interrupt_of_the_real_program(world: World) -> None:
    only = ["--only", "preflight,pod deleted,policies", "--poll", "1"]  # so that it waits for the run's end for seconds
    command = [sys.executable, "-m", "pipelines.prove", *world.flags, *only]
    child = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    with child, ended(child):
        deadline = time.monotonic() + 120
        while not any(request.endswith("/pods") for request in world.kube.seen) or not world.kfp.runs:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=120)
    assert child.returncode == 75
    assert "3 checks: 1 ok, 0 failed, 2 not tried" in output
    world.expect_nothing_left()


@pytest.mark.faults
def test_a_check_that_raises_is_one_failed_row(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses.Bench, "training_under_way", lambda *_: {}["metadata"])
    with pytest.raises(prove.NotProved, match=r"failed: pod deleted, run canceled$"):
        world.prove("--only", "preflight,pod deleted,run canceled,policies")
    assert world.states()["policies"] == OK
    assert "the check itself failed: KeyError" in world.seen("pod deleted")
    world.expect_nothing_left()


@pytest.mark.faults
def test_a_check_has_a_time_limit(world: World) -> None:
    world.cluster.kube.created = lambda pod: None  # its pods stay Pending
    with pytest.raises(prove.NotProved, match="failed: policies"):
        world.prove("--only", "preflight,policies", "--time-factor", "0.001")
    assert "not in time: the start of pod prove-" in world.seen("policies")


def test_what_is_kept_can_be_removed_later(world: World) -> None:
    world.prove("--only", "preflight,digits", "--keep")
    [name] = {run["display_name"].split()[0] for run in world.kfp.runs}
    assert (
        f"everything (--keep); to remove it: python -m pipelines.prove --clean {name}"
        in (world.output / "prove.md").read_text()
    )
    assert list(world.cluster.store.iterdir())
    world.prove("--clean", name)
    world.expect_nothing_left()


@pytest.mark.faults
def test_what_cannot_be_removed_is_said(world: World) -> None:
    world.kfp.faults = [Fault("DELETE", "/experiments/", 500, times=9)]
    world.prove("--only", "preflight,digits")
    assert "left behind: experiment prove-" in (world.output / "prove.md").read_text()
    assert not world.kfp.runs and not world.kube.pods


def test_a_report_with_any_text_is_valid() -> None:
    rows = [Row("a|b", "x < y", FAILED, "\x1b[31mred\x00 & <b>\nsecond | line", 1.0), Row("c", "", OK, "é", 0.0)]
    report = Report("prove-1", {"where": "http://x & y"}, rows, ["a pod: <gone>"])
    suite = ElementTree.fromstring(report.junit())
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["skipped"]) == ("2", "1", "0")
    lines = [line for line in report.markdown().splitlines() if line.startswith("| failed")]
    assert lines == ["| failed | a\\|b | x &lt; y | \x1b[31mred\x00 & &lt;b><br>second \\| line | 1 |"]
    assert "prove-1: 2 checks: 1 ok, 1 failed, 0 not tried" in report.text()
