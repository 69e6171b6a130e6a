"""The programs that a proof runs in pods, as real processes: addresses, the store, MLflow, a served version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import EVALUATE, ROOT, environment
from ending import ended
from mlflow import MlflowClient
from ports import free_port
from s3servers import BUCKET, KEY, SECRET, Server, moto_server  # noqa: F401

from components.tracking import access
from pipelines.kfp import links
from pipelines.prove.pods import INSIDE, body
from runtime import manifest
from security.pods import restricted

NAME = "prove-20261128-053000"


def inside(program: str, *words: str, **env: str) -> Any:
    """The JSON that it printed last."""
    command = [sys.executable, "-c", (INSIDE / f"{program}.py").read_text(), *words]
    done = subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pod_of_the_proof_has_the_settings_of_a_step(package: list[dict[str, Any]]) -> None:
    """Those of register, as Kubeflow's own driver has rendered it (tests/kubeflow/render.sh)."""
    theirs = json.loads((ROOT / "tests/kubeflow/pods.json").read_text())["register"]
    inputs = package[0]["root"]["inputDefinitions"]["parameters"]
    run = {name: given.get("defaultValue") for name, given in inputs.items()}
    pod = body("name", "reach", [], "image", NAME, run, "1Gi")
    ours, platform = pod["spec"], package[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-register"]

    def settings(spec: dict[str, Any]) -> dict[str, Any]:
        """Environment, volumes by path and the user of the only container."""
        [container] = spec["containers"]
        env = {v["name"]: (v.get("value"), v.get("valueFrom")) for v in container["env"]}
        sources = {v["name"]: {k: x for k, x in v.items() if k != "name"} for v in spec["volumes"]}
        mounts = {m["mountPath"]: sources[m["name"]] for m in container["volumeMounts"]}
        return {"env": env, "mounts": mounts, "user": {**spec["securityContext"], **container["securityContext"]}}

    found, expected = settings(ours), settings(theirs)
    of_kubeflow = {"VGG_PIPELINE_RUN", "KFP_POD_NAME", "KFP_POD_UID"}
    assert found["env"] == {name: value for name, value in expected["env"].items() if name not in of_kubeflow}
    assert found["mounts"] == {path: expected["mounts"][path] for path in ("/store", "/tmp")}
    assert expected["user"].items() <= found["user"].items()
    labels = platform["podMetadata"]["labels"]
    assert pod["metadata"]["labels"].keys() >= labels.keys()
    assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == labels["app.kubernetes.io/part-of"]
    assert not restricted(ours)


def test_addresses_that_answer_and_others() -> None:
    port = free_port()
    command = [sys.executable, "-c", (INSIDE / "listen.py").read_text(), str(port)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with child, ended(child):
        assert child.stdout and json.loads(child.stdout.readline()) == {"port": port}
        here, closed, nowhere = f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}", "no-such-name.invalid:80"
        found = inside("reach", here, closed, nowhere)
    assert found[here] == "open"
    assert found[closed] == "connection refused"
    assert found[nowhere].startswith("no such name")


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_what_is_in_the_store_is_read_and_removed_and_nothing_else(
    kind: str, tmp_path: Path, client: MlflowClient, moto_server: Server
) -> None:
    metrics = {"top1_error": 0.5, "headline": "dense_Q32"}
    folder = tmp_path / "made"
    folder.mkdir()
    inputs = {"shards": "1.dir", "weights_sha256": "e3"}
    manifest.write(folder, "vgg.predictions/2", {"evaluate": EVALUATE, "inputs": inputs, "metrics": metrics}, [])
    raw = (folder / manifest.NAME).read_bytes()
    files = {f"{NAME}/predictions/ab12/{manifest.NAME}": raw, f"{NAME}/shards/cd/x.tar": b"x", "shards/cd/x.tar": b"x"}
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "VGG_CACHE": str(tmp_path / "cache")}
    if kind == "folder":
        store = str(tmp_path / "store")
        for name, content in files.items():
            (tmp_path / "store" / name).parent.mkdir(parents=True)
            (tmp_path / "store" / name).write_bytes(content)
    else:
        store = f"s3://{BUCKET}/runs"
        env |= {"AWS_ENDPOINT_URL": moto_server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        env |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        s3 = boto3.client(
            "s3", endpoint_url=moto_server.endpoint, region_name="us-east-1", aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )  # fmt: skip
        for name, content in files.items():
            s3.put_object(Bucket=BUCKET, Key=f"runs/{name}", Body=content)
    [found] = inside("stored", VGG_STORE=f"{store}/{NAME}", **env)
    assert found == {"evaluate": EVALUATE, "inputs": inputs, "metrics": metrics}

    experiment = client.create_experiment(access.EXPERIMENT)
    ours, other = links.lineage("run-of-the-proof"), links.lineage("another-run")
    parents = [client.create_run(experiment, tags={"vgg.lineage": one}).info.run_id for one in (ours, other)]
    for parent in parents:
        client.create_run(experiment, tags={"mlflow.parentRunId": parent})
    for model in (NAME, f"{NAME}.lease", "vgg16-digits"):
        client.create_registered_model(model)
    given = json.dumps({"name": NAME, "models": [NAME, f"{NAME}-short"], "lineages": [ours]})

    refused = inside("remove", given, VGG_STORE=store, **env)  # the site's own store
    assert "is not that of prove-" in refused["left"][0]
    removed = inside("remove", given, VGG_STORE=f"{store}/{NAME}", **env)
    assert removed["left"] == []
    assert [model.name for model in client.search_registered_models()] == ["vgg16-digits"]
    kept = {run.info.run_id: run.data.tags for run in client.search_runs([experiment])}
    assert len(kept) == 2 and all(other == t.get("vgg.lineage") or parents[1] in t.values() for t in kept.values())
    if kind == "folder":
        left = [str(path.relative_to(store)) for path in Path(store).rglob("*") if path.is_file()]
    else:
        listed = s3.list_objects_v2(Bucket=BUCKET, Prefix="runs/")
        left = [item["Key"].removeprefix("runs/") for item in listed["Contents"]]
    assert left == ["shards/cd/x.tar"]
