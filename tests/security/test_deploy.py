"""deploy/: rendered and checked against the published schemas and our rules; each rule is violated once."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from broken import change
from conftest import ROOT, environment
from rendering import OVERLAYS, named, node_pod, render, rendered, site

from components.trainjob.body import body
from runtime.errors import BadData, Refused
from security.manifests import faults, load, main, pod_specs

# --- what is there


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_to_the_schemas_and_to_every_rule(overlay: str) -> None:
    assert [line for document in rendered(overlay) for line in faults(document)] == []
    assert {document["metadata"]["namespace"] for document in rendered(overlay)} == {"kubeflow"}
    assert sum(1 for document in rendered(overlay) for _ in pod_specs(document)) == 3


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_without_its_component_an_overlay_needs_no_trainer(overlay: str) -> None:
    """The API server refuses a kind that it does not know, and `kubectl apply` ends with 1."""
    groups = {document["apiVersion"] for document in load(render(ROOT / "deploy" / overlay))}
    assert groups <= {"v1", "apps/v1", "batch/v1", "rbac.authorization.k8s.io/v1", "networking.k8s.io/v1"}
    assert "trainer.kubeflow.org/v1alpha1" in {document["apiVersion"] for document in rendered(overlay)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_applied_again_can_be_changed(overlay: str) -> None:
    """The template of a Job is immutable, so the one that makes the store writable is not applied with the rest."""
    assert "Job" not in {document["kind"] for document in load(render(ROOT / "deploy" / overlay))}
    [job] = load(render(ROOT / "deploy/store-writable"))
    assert (job["kind"], job["metadata"]["name"], job["metadata"]["namespace"]) == (
        "Job", "vgg-store-writable", "kubeflow"
    )  # fmt: skip
    # it ends in any case, also if its image cannot be pulled, and is then removed
    assert job["spec"]["activeDeadlineSeconds"] == job["spec"]["ttlSecondsAfterFinished"] == 600


def test_the_names_that_a_run_takes_by_default_are_there() -> None:
    found = {(d["kind"], d["metadata"]["name"]) for d in rendered("base")}
    assert found >= {
        ("TrainingRuntime", "vgg-train"), ("Role", "vgg-pipeline"), ("RoleBinding", "vgg-pipeline"),
        ("ConfigMap", "vgg-addresses"), ("PersistentVolumeClaim", "vgg-store"),
        ("Deployment", "mlflow"), ("Service", "mlflow"),
    }  # fmt: skip
    jobs = named("TrainingRuntime", "vgg-train")["spec"]["template"]["spec"]["replicatedJobs"]
    assert [(job["name"], [c["name"] for c in node_pod(job)["containers"]]) for job in jobs] == [("node", ["node"])]


def test_the_pipeline_may_do_this_and_nothing_else() -> None:
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in named("Role", "vgg-pipeline")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert allowed == {
        ("trainer.kubeflow.org", "trainjobs"): {"create", "get", "list", "watch", "delete"},
        ("jobset.x-k8s.io", "jobsets"): {"get"},
        ("", "pods"): {"get", "list", "watch"},
        ("", "pods/log"): {"get"},
        ("", "events"): {"list", "watch"},
    }
    binding = named("RoleBinding", "vgg-pipeline")
    assert [(s["kind"], s["name"]) for s in binding["subjects"]] == [("ServiceAccount", "pipeline-runner")]


def outcome(message: str, reason: str) -> str:
    """JobSet's action when the nodes' Job has failed: that of the first matching rule, else a restart that counts."""
    for rule in named("TrainingRuntime", "vgg-train")["spec"]["template"]["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns") or [""]
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return str(rule["action"])
    return "RestartJobSet"


def failed_job(code: int | None, disrupted: bool) -> tuple[str, str]:
    """(message, reason) of a Job whose pod failed, as Kubernetes writes them."""
    policy = named("TrainingRuntime", "vgg-train")["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert policy["backoffLimit"] == 0
    for number, rule in enumerate(policy["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if code in rule.get("onExitCodes", {}).get("values", []):
            message = f"Container node for pod kubeflow/x failed with exit code {code}"
        elif disrupted and rule.get("onPodConditions"):
            message = "Pod kubeflow/x has condition DisruptionTarget"
        else:
            continue
        return f"{message} matching FailJob rule at index {number}", "PodFailurePolicy"
    return "Job has reached the specified backoff limit", "BackoffLimitExceeded"


@pytest.mark.parametrize(
    "code, disrupted, then",
    [
        (64, False, "FailJobSet"),
        (65, False, "FailJobSet"),
        (78, False, "FailJobSet"),
        (78, True, "FailJobSet"),
        (69, False, "RestartJobSet"),
        (74, False, "RestartJobSet"),
        (75, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),  # out of memory
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_the_nodes_start_again_only_where_it_can_help(code: int, disrupted: bool, then: str) -> None:
    assert outcome(*failed_job(code, disrupted)) == then


def merged(place: Any, patch: Any) -> Any:
    """A strategic merge, as in Trainer: lists of named items by name, mounts by path, all other lists replaced."""
    if isinstance(place, dict) and isinstance(patch, dict):
        return {**place, **{key: merged(place.get(key), value) for key, value in patch.items()}}
    if isinstance(place, list) and isinstance(patch, list) and patch and isinstance(patch[0], dict):
        key = next((key for key in ("mountPath", "name") if key in patch[0]), None)
        if key:
            patches = {one[key]: one for one in patch}
            kept = [merged(one, patches.pop(one[key])) if one[key] in patches else one for one in place]
            return [*kept, *patches.values()]
    return patch


def test_the_pods_of_a_trainjob_keep_to_every_rule() -> None:
    """The runtime with the values of the training step, merged as by Trainer."""
    asked = argparse.Namespace(
        nodes=2, gpus=4, gpu_type="nvidia.com/gpu", cpu="8", memory="32Gi", image=f"r/vgg-train@sha256:{'0' * 64}",
        node_selector='{"pool": "a100"}', tolerations='[{"key": "spot", "operator": "Exists"}]', claim="other",
        addresses="vgg-addresses", store_secret="vgg-store", tracking_secret="vgg-tracking", runtime="vgg-train",
        module="components.train", arguments=["--params", "{}"],
    )  # fmt: skip
    trainjob = body(asked)
    assert faults(trainjob) == []
    runtime, trainer = named("TrainingRuntime", "vgg-train", "overlays/gpu"), trainjob["spec"]["trainer"]
    own = {key: trainer[key] for key in ("image", "command", "args", "env")} | {
        "resources": trainer["resourcesPerNode"]
    }
    container = {"name": "node", **own}
    pod_patch = {"template": {"spec": {"template": {"spec": {"containers": [container]}}}}}
    for patch in ({"replicatedJobs": [{"name": "node", **pod_patch}]}, *(
        given["trainingRuntimeSpec"]["template"]["spec"] for given in trainjob["spec"]["runtimePatches"]
    )):  # fmt: skip
        runtime["spec"]["template"]["spec"] = merged(runtime["spec"]["template"]["spec"], patch)
    assert faults(runtime) == []
    pod = node_pod(runtime["spec"]["template"]["spec"]["replicatedJobs"][0])
    assert {v["name"]: next(iter(v.keys() - {"name"})) for v in pod["volumes"]} == {
        "shared-memory": "emptyDir", "scratch": "emptyDir", "store": "persistentVolumeClaim",
    }  # fmt: skip
    assert next(v for v in pod["volumes"] if v["name"] == "store")["persistentVolumeClaim"] == {"claimName": "other"}
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true", "pool": "a100"}
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "4"}
    assert len({m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}) == 3


# --- each rule broken


POD = "spec.template.spec"
NODES = "spec.template.spec.replicatedJobs.0.template"
NODE_POD = f"{NODES}.spec.template.spec"


@pytest.mark.parametrize(
    "kind, name, path, value, message",
    [
        # the schemas
        ("Deployment", "mlflow", "spec.replica", 1, "replica"),
        ("Deployment", "mlflow", f"{POD}.containers.0.imagePullpolicy", "Never", "imagePullpolicy"),
        ("Deployment", "mlflow", "spec.replicas", "one", "'one' is not of type 'integer'"),
        ("Role", "vgg-pipeline", "apiVersion", "rbac.authorization.k8s.io/v1beta1", "no published schema"),
        ("NetworkPolicy", "vgg-deny", "spec.podSelectors", {}, "podSelectors"),
        ("TrainingRuntime", "vgg-train", "spec.mlPolicy.pytorch", {}, "spec.mlPolicy.pytorch: not a field"),
        ("TrainingRuntime", "vgg-train", "spec.mlPolicy.numNodes", "two", "numNodes: Input should be a valid integer"),
        ("TrainingRuntime", "vgg-train", f"{NODES}.spec.podFailurePolicies", {}, "podFailurePolicies"),
        ("TrainingRuntime", "vgg-train", f"{NODE_POD}.containers.0.volumemounts", [], "volumemounts: not a field"),
        # rules of Trainer and JobSet
        ("TrainingRuntime", "vgg-train", f"{NODES}.metadata.labels", {}, "without the label of the trainer's step"),
        ("TrainingRuntime", "vgg-train", f"{NODE_POD}.containers.0.name", "trainer", "a container 'node'"),
        ("TrainingRuntime", "vgg-train", f"{NODE_POD}.restartPolicy", "OnFailure", "requires restartPolicy Never"),
        ("TrainingRuntime", "vgg-train", "spec.template.spec.failurePolicy.rules.0.action", "Fail", "not an action"),
        ("TrainingRuntime", "vgg-train", "spec.template.spec.failurePolicy.rules.1.name", "1st", "not a valid rule"),
        (
            "TrainingRuntime", "vgg-train", "spec.template.spec.failurePolicy.rules.1.onJobFailureReasons", ["Evicted"],
            "Evicted is not a failure reason",
        ),
        # our rules for pods
        ("TrainingRuntime", "vgg-train", f"{NODE_POD}.automountServiceAccountToken", None, "must be false"),
        ("TrainingRuntime", "vgg-train", f"{NODE_POD}.containers.0.image", "vgg-train", "neither tag nor digest"),
        ("TrainingRuntime", "vgg-train", f"{NODE_POD}.containers.0.image", "r:5000/vgg:latest", "not a fixed image"),
        ("TrainingRuntime", "vgg-train", f"{NODE_POD}.securityContext.runAsUser", None, "must be a number"),
        ("Deployment", "mlflow", f"{POD}.containers.0.securityContext.readOnlyRootFilesystem", None, "must be true"),
        ("Deployment", "mlflow", f"{POD}.containers.0.resources.limits.memory", None, "limits.memory: is missing"),
        (
            "Deployment", "mlflow", f"{POD}.containers.0.env", [{"name": "MLFLOW_AUTH_ADMIN_PASSWORD", "value": "x"}],
            "a literal value; use a secret",
        ),
        # rights
        ("Role", "vgg-pipeline", "kind", "ClusterRole", "rights in the whole cluster"),
        ("Role", "vgg-pipeline", "rules.0.verbs", ["*"], "* is not allowed"),
        ("Role", "vgg-pipeline", "rules.0.resources", ["*"], "* is not allowed"),
        ("Role", "vgg-pipeline", "rules.3.resources", ["pods", "secrets"], "secrets is not allowed"),
        ("Role", "vgg-pipeline", "rules.3.resources", ["pods/exec"], "pods/exec is not allowed"),
        ("RoleBinding", "vgg-pipeline", "roleRef.kind", "ClusterRole", "bind one of our Roles"),
        # networks
        ("NetworkPolicy", "vgg-services", "spec.egress.4.to.0.ipBlock.except", None, "reaches 169.254.169.254"),
        ("NetworkPolicy", "vgg-services", "spec.egress.4.to.0.ipBlock.except", ["10.0.0.0/8"], "reaches 169.254"),
        ("NetworkPolicy", "vgg-services", "spec.egress.4.to.0.ipBlock", {"cidr": "::/0"}, "reaches fd00:ec2::254"),
        ("NetworkPolicy", "vgg-services", "spec.egress.1.to", [], "allows all peers"),
        ("NetworkPolicy", "mlflow", "spec.ingress.0.from", None, "allows all peers"),
        ("NetworkPolicy", "vgg-services", "spec.policyTypes", ["Ingress"], "rules for Egress but does not list it"),
        # secrets
        ("ConfigMap", "vgg-addresses", "kind", "Secret", "create it with kubectl"),
        ("ConfigMap", "vgg-addresses", "data.auth", "admin_password = x", "data.auth: looks like a secret"),
    ],
)  # fmt: skip
def test_a_broken_manifest_is_refused(kind: str, name: str, path: str, value: Any, message: str) -> None:
    document = named(kind, name)
    change(document, path, value)
    assert message in "\n".join(faults(document))


# --- the program


def test_the_program_reads_what_kubectl_writes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "security.manifests", "-"], input=render(ROOT / "deploy/overlays/kind"),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "13 objects" in done.stdout


def test_the_program_reports_violations(tmp_path: Path) -> None:
    path = tmp_path / "rendered.yaml"
    path.write_text(render(ROOT / "deploy/base").replace("runAsNonRoot: true", "runAsNonRoot: false"))
    with pytest.raises(Refused, match=r"Deployment/mlflow: .*runAsNonRoot: must not be false"):
        main([str(path)])
    for text in ("kind: [", "", "- a\n"):
        path.write_text(text)
        with pytest.raises(BadData, match=r"not YAML|not a list of Kubernetes objects"):
            main([str(path)])


def blocks() -> list[str]:
    """The commands of docs/cluster.md."""
    return re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/cluster.md").read_text(), re.MULTILINE | re.DOTALL)


def shell(commands: str, cwd: Path) -> str:
    env = environment(VGG_REGISTRY="registry.example:5000/team")
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(["bash", "-eu", "-c", commands], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documented_kustomization_of_a_site(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    [block] = [block for block in blocks() if "build/site/kustomization.yaml" in block]
    for trainer, kinds in (("# components:", set()), ("components:", {"TrainingRuntime"})):
        shell(block.partition("kubectl kustomize")[0].replace("# components:", trainer), tmp_path)
        found = load(render(tmp_path / "build/site"))
        assert [line for document in found for line in faults(document)] == []
        assert {document["kind"] for document in found} & {"TrainingRuntime"} == kinds
    [job] = load(render(tmp_path / "build/store"))
    [mlflow] = [document for document in found if document["kind"] == "Deployment"]
    for document in (mlflow, job):
        [container] = document["spec"]["template"]["spec"]["containers"]
        assert re.fullmatch(r"registry\.example:5000/team/vgg-serve:register-[0-9a-f]{16}", container["image"])
    [claim] = [document for document in found if document["metadata"]["name"] == "vgg-store"]
    assert claim["spec"]["storageClassName"] == "shared"


def test_the_pod_that_copies_the_data_passes_all_rules(tmp_path: Path) -> None:
    [block] = [block for block in blocks() if "name: vgg-copy" in block]
    document = block.partition("apply -f - ")[2].partition("\nEND\n")[0]
    [pod] = load(shell(f"cat {document}\nEND\n", tmp_path))
    assert faults(pod) == []
    assert pod["spec"]["containers"][0]["image"].startswith("registry.example:5000/team/vgg-data:shard-")


def kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif("VGG_CLUSTER" not in os.environ, reason="needs a cluster, and VGG_CLUSTER=1")
def test_a_cluster_accepts_it(tmp_path: Path) -> None:
    """In a namespace of its own, because a Job that exists already can not be changed."""
    namespace = f"vgg-test-{uuid.uuid4().hex[:8]}"
    done = kubectl("create", "namespace", namespace)
    assert done.returncode == 0, done.stderr
    try:
        trainer = kubectl("get", "crd", "trainingruntimes.trainer.kubeflow.org").returncode == 0
        for overlay in OVERLAYS:
            site(tmp_path, overlay, namespace, trainer)
            done = kubectl("apply", "--dry-run=server", "--validate=strict", "-k", str(tmp_path))
            assert done.returncode == 0, done.stderr
    finally:
        kubectl("delete", "namespace", namespace, "--wait=false")
