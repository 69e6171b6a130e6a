"""Checks before a submission, and authentication: incomplete clusters, registries, servers."""

# fixtures

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kfpworld import World, package, world  # noqa: F401
from kubeobjects import ImageRegistry
from s3servers import BUCKET, KEY, SECRET, Server, moto_server  # noqa: F401

from pipelines import submit
from pipelines.kfp import access
from pipelines.preflight.registry import Registries
from pipelines.preflight.scheduling import fitting
from runtime.errors import Refused, Unreachable, WrongParameters


def test_the_preflight_reports_everything_missing_and_creates_nothing(world: World) -> None:
    world.kube.objects = {"/version": {}}
    world.kube.nodes(
        a={"gpus": 4}, b={"gpus": 8, "unschedulable": True}, c={"gpus": 8, "labels": {"pool": "no"}},
        d={"gpus": 8, "labels": {"pool": "gpu"}, "taints": [{"key": "dear", "value": "yes", "effect": "NoSchedule"}]},
    )  # fmt: skip
    flags = world.images()
    world.registry.manifests = {k: v for k, v in world.registry.manifests.items() if "train_image" not in k}
    with pytest.raises(Refused) as caught:
        world.submit(*flags, "-C", "nodes=2", "-C", "gpus=8", "-C", "node_selector={pool: gpu}")
    for part in (
        "preflight: 5 items missing, nothing was created",
        f"train_image: {world.registry.host}/vgg/train_image:1: not in its registry",
        "ConfigMap vgg-addresses: not in namespace kubeflow. Create it: kubectl -n kubeflow create configmap",
        "volume claim vgg-store: not in namespace kubeflow",
        "Kubeflow Trainer: the cluster serves no TrainJobs (trainer.kubeflow.org/v1alpha1)",
        "GPUs: 2 nodes with 8 nvidia.com/gpu needed, 0 found: a has no label pool=gpu; b is cordoned; "
        "c has no label pool=gpu; d has the taint dear=yes:NoSchedule, which is not tolerated",
    ):
        assert part in str(caught.value)
    assert "note         Secret vgg-store: not in namespace kubeflow" in world.caplog.text
    assert not [line for line in world.kfp.seen if line.startswith("POST")]


def test_the_preflight_reports_what_exists_and_what_it_could_not_check(world: World) -> None:
    output = world.submit(*world.images(), "--preflight", "-C", "nodes=2", "-C", "gpus=8")
    assert "MISSING" not in output and "not checked" not in output
    assert "ok           GPUs: 2 nodes with 8 nvidia.com/gpu (possibly in use), 2 needed" in output
    assert "ok           store /store: a folder on the volume claim" in output
    world.kube.forbidden = {"/api/v1/nodes", "/secrets/vgg-store"}
    world.kube.put("configmaps/vgg-addresses", data={"VGG_STORE": "s3://bucket/x", "MLFLOW_TRACKING_URL": "http://m"})
    with pytest.raises(Refused, match="has no MLFLOW_TRACKING_URI"):
        world.submit(*world.images(), "--preflight", "-C", "nodes=2")
    output = world.caplog.text
    world.kube.put("configmaps/vgg-addresses", data={"VGG_STORE": "s3://bucket/x", "MLFLOW_TRACKING_URI": "m:5000"})
    with pytest.raises(Refused, match="ConfigMap vgg-addresses: MLFLOW_TRACKING_URI=m:5000: write http://m:5000"):
        world.submit(*world.images(), "--preflight")
    world.kube.put("configmaps/vgg-addresses", data={"VGG_STORE": "s3://bucket/x", "MLFLOW_TRACKING_URI": "http://m"})
    output = world.submit(*world.images(), "--preflight")
    assert "not checked  GPUs: no permission to read /api/v1/nodes in Kubernetes (403)" in output
    assert "not checked  Secret vgg-store: no permission to read" in output
    assert "not checked  store s3://bucket/x: " in output
    assert not [line for line in world.kfp.seen if line.startswith("POST")]


def test_a_pod_that_fits_into_no_node_is_noticed(world: World) -> None:
    flags = [*world.images(), "-C", "gpus=0", "-C", "nodes=2", "-C", "node_selector={pool: gpu}", "--preflight"]
    small = {"cpu": "15890m", "memory": "64Gi"}  # of 16 and 66: the system has the rest
    world.kube.nodes(a={"labels": {"pool": "gpu"}, **small}, b={"labels": {"pool": "gpu"}, "unschedulable": True}, c={})
    with pytest.raises(Refused) as caught:
        world.submit(*flags)
    assert str(caught.value).splitlines()[1:] == [
        "  size of the nodes: no node has the 16 CPUs and 64Gi of a node of the training: the largest, a, offers 15.89 "
        "CPUs and 64.0 GiB. Request less (docs/cluster.md, 6); --no-gpu-check if nodes are created on demand"
    ]
    assert "MISSING" not in world.submit(*flags, "--no-gpu-check")
    fits = world.submit(*flags, "-C", "train_cpu=15")
    assert "ok           size of the nodes: every pod fits into an empty node" in fits
    world.kube.nodes(a={"labels": {"pool": "gpu"}, "cpu": "4", "memory": "16Gi"})
    with pytest.raises(Refused, match=r"16 CPUs and 32Gi of step shard: the largest, a, offers 4 CPUs and 16.0 GiB"):
        world.submit(*flags)


def test_without_kubernetes_the_submission_continues(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    output = world.submit(*world.images())
    assert "GPUs: no Kubernetes access" in output
    assert len(world.kfp.runs) == 1


def test_a_store_is_checked_with_this_machines_credentials(
    world: World, moto_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {
        "AWS_ENDPOINT_URL": moto_server.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": "http://m",
    }
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    world.kube.put("configmaps/vgg-addresses", data={**here, "VGG_STORE": f"s3://{BUCKET}/runs"})
    flags = ["--preflight", "--no-image-check"]
    assert f"not checked  store s3://{BUCKET}/runs: this machine has no credentials for it" in world.submit(*flags)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert f"ok           store s3://{BUCKET}/runs: accessible with this machine's credentials" in world.submit(*flags)
    world.kube.put("configmaps/vgg-addresses", data={**here, "VGG_STORE": "s3://another/runs"})
    with pytest.raises(Refused, match=r"store s3://another/runs: no bucket another at http://127\.0\.0\.1:"):
        world.submit(*flags)
    here["AWS_ENDPOINT_URL"] = "http://seaweedfs.invalid:9000"  # a name that only the cluster resolves
    world.kube.put("configmaps/vgg-addresses", data={**here, "VGG_STORE": f"s3://{BUCKET}/runs"})
    assert "cannot be reached from this machine" in world.submit(*flags)


def test_nodes_are_counted_by_kubernetes_rules() -> None:
    taint = {"key": "k", "value": "v", "effect": "NoExecute"}
    node = {"metadata": {"name": "n"}, "spec": {"taints": [taint]}, "status": {"allocatable": {"g": "2"}}}
    for toleration, fits in (
        ({"operator": "Exists"}, True), ({"key": "k", "operator": "Exists"}, True), ({"key": "k", "value": "v"}, True),
        ({"key": "k", "value": "w"}, False), ({"key": "k"}, False), ({"key": "j", "operator": "Exists"}, False),
        ({"operator": "Exists", "effect": "NoSchedule"}, False), ({"operator": "Exists", "effect": "NoExecute"}, True),
    ):  # fmt: skip
        assert bool(fitting([node], 2, "g", {}, [toleration])[0]) == fits, toleration
    taint["effect"] = "PreferNoSchedule"
    assert fitting([node], 2, "g", {}, []) == (["n"], [])
    assert fitting([node], 3, "g", {}, []) == ([], ["n has 2"])
    assert fitting([node], 1, "other", {}, []) == ([], [])


def test_images_are_read_with_the_credentials_of_docker_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ImageRegistry() as registry, ImageRegistry(password="", silent=True) as open_one:
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(registry.auth_file(tmp_path / "auth.json")))
        by_digest = registry.push("vgg/train:1")
        assert Registries().pinned(f"{registry.host}/vgg/train:1") == by_digest
        assert Registries().pinned(by_digest) == by_digest
        assert open_one.push("a:b") == Registries().pinned(f"{open_one.host}/a:b")  # the answer has no digest: computed
        with pytest.raises(Refused, match="not in its registry"):
            Registries().pinned(f"{registry.host}/vgg/train:2")
        registry.realm = "http://elsewhere.invalid/token"
        with pytest.raises(Refused, match=r"send your password unencrypted to http://elsewhere.invalid/token"):
            Registries().pinned(by_digest)
        registry.realm = f"http://{registry.host}/token"
        registry.password = "another"
        with pytest.raises(Refused, match=r"no permission to read it \(401\). Log in: podman login 127.0.0.1"):
            Registries().pinned(f"{registry.host}/vgg/train:1")
    with pytest.raises(Unreachable, match=r"does not answer .*--no-image-check"):
        Registries().pinned(f"{registry.host}/vgg/train:1")
    for wrong in ("", "vgg train:1", "train", "UPPER://x:1"):
        with pytest.raises(WrongParameters, match="is not an image reference"):
            Registries().pinned(wrong)


def test_images_are_read_with_tokens_and_credential_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, helper = tmp_path / "auth.json", tmp_path / "docker-credential-test"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with ImageRegistry() as registry:
        by_digest, tagged = registry.push("vgg/train:1"), f"{registry.host}/vgg/train:1"
        path.write_text(json.dumps({"auths": {registry.host: {"identitytoken": registry.password}}}))
        assert Registries().pinned(tagged) == by_digest
        path.write_text(json.dumps({"credHelpers": {registry.host: "test"}}))
        with pytest.raises(WrongParameters, match="cannot read its credentials"):
            Registries().pinned(tagged)
        answer = json.dumps({"ServerURL": registry.host, "Username": "me", "Secret": registry.password})
        helper.write_text(f"#!/bin/sh\necho '{answer}'\n")
        helper.chmod(0o755)
        assert Registries().pinned(tagged) == by_digest


def test_an_old_server_is_recognized(world: World) -> None:
    world.kfp.version = "2.14.4"
    with pytest.raises(Refused, match=r"Kubeflow Pipelines 2\.14\.4 is too old; this package needs 2\.15 or later"):
        world.submit("--no-image-check")
    world.kfp.version = "unknown"
    assert "does not report its version" in world.submit("--no-image-check")


def test_credentials_of_the_submitter(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--no-image-check"]
    world.kfp.token = "canary-of-a-token"
    with pytest.raises(Refused, match=r"access denied \(401\). No credentials were sent. Set KF_PIPELINES_TOKEN"):
        world.submit(*flags)
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "canary-of-a-token")
    world.submit(*flags)
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "canary-of-a-token, but expired")
    with pytest.raises(Refused, match=r"Credentials sent: the token of KF_PIPELINES_TOKEN. Have they expired?"):
        world.submit(*flags)
    monkeypatch.delenv("KF_PIPELINES_TOKEN")
    path = tmp_path / "token"
    path.write_text("canary-of-a-token\n")
    world.submit(*flags, "--token-file", str(path))
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(path))
    world.submit(*flags)
    path.unlink()
    with pytest.raises(WrongParameters, match="cannot read the token"):
        world.submit(*flags)
    monkeypatch.delenv("KF_PIPELINES_SA_TOKEN_PATH")
    world.kfp.token, world.kfp.cookie = "", "session=canary-of-a-cookie"
    with pytest.raises(Refused, match=r"403.*RBAC: access denied"):
        world.submit(*flags)
    world.kfp.login = "http://login.invalid/dex"
    with pytest.raises(
        Refused,
        match=r"perhaps a login page. No credentials were sent. Set KF_PIPELINES_TOKEN .* or KF_PIPELINES_COOKIES",
    ):
        world.submit(*flags)
    monkeypatch.setenv("KF_PIPELINES_COOKIES", "session=canary-of-a-cookie")
    world.submit(*flags)
    world.kfp.login, world.kfp.cookie = "", "session=another"
    with pytest.raises(
        Refused, match=r"access denied to \*\*\*. Credentials sent: the cookies of KF_PIPELINES_COOKIES"
    ):
        world.submit(*flags)


def test_address_of_the_server(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, message in (
        ("http://me:secret@x", "must not contain a password"),
        ("localhost:8888", "write it with http"),
    ):
        with pytest.raises(WrongParameters, match=message):
            submit.main(["--host", wrong])
    with pytest.raises(WrongParameters, match="give --host URL"):
        submit.main([])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert access.address(None) == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "https://kubeflow.invalid/pipeline/")
    assert access.address(None) == "https://kubeflow.invalid/pipeline"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    monkeypatch.setenv("HTTP_PROXY", world.kfp.endpoint)
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    world.submit("--host", "http://kubeflow.invalid", "--no-image-check")
    assert len(world.kfp.runs) == 1


def test_a_namespace_for_every_user(world: World) -> None:
    world.kfp.multi_user = True
    with pytest.raises(WrongParameters, match="give yours: --namespace NS"):
        world.submit("--no-image-check")
    world.kube.forbidden = {""}  # no access to Kubernetes at all
    world.submit("--no-image-check", "--namespace", "team")
    assert world.kfp.experiments[0]["namespace"] == world.kfp.pipelines[0]["namespace"] == "team"
