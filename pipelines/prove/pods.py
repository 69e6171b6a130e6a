"""Pods of a proof: the text of a program of inside/, run in an image of the steps, with or without a step's labels."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from components import given
from pipelines.definition.harden import USER
from pipelines.kfp.pending import reason
from pipelines.prove.bench import Bench, Different
from pipelines.prove.objects import LABEL, Object

INSIDE = Path(__file__).with_name("inside")
PROGRAM = "vgg.prove-program"  # label: which program of inside/
END_SECONDS = 3600  # after which Kubernetes ends a pod that nobody deleted
STEP = {"vgg.stage": "prove", "app.kubernetes.io/part-of": "vgg-imagenet"}  # what the policies select


def inside(bench: Bench, program: str, *words: str, as_step: bool = True, memory: str = "1Gi") -> Any:
    """Run a program of inside/ to its end; the JSON that it printed last.  memory: that the pod requests."""
    name = start(bench, program, *words, as_step=as_step, memory=memory)
    running(bench, name)

    def look() -> Object | None:
        pod = bench.cluster.pod(name)
        if pod is None:
            raise Different(f"pod {name} is gone")
        return pod if pod["status"].get("phase") in ("Succeeded", "Failed") else None

    pod = bench.until(look, f"the end of pod {name}")
    lines = bench.log_of(pod).strip().splitlines()
    if pod["status"]["phase"] == "Succeeded":
        for line in reversed(lines):  # a log has stdout and stderr, in which libraries may say more at the end
            with contextlib.suppress(ValueError):
                if isinstance(found := json.loads(line), dict | list):
                    return found
    raise Different(f"pod {name} {pod['status']['phase']}: {' | '.join(lines[-5:]) or 'no log'}")


def start(bench: Bench, program: str, *words: str, as_step: bool = True, memory: str = "1Gi") -> str:
    """Start a program of inside/ in a pod; returns the pod's name."""
    bench.expect_allowed(("create", "pods"), ("get", "pods/log"))
    if as_step:
        bench.make_addresses()
    arguments = {**bench.package.defaults, **bench.arguments()}
    name = f"{bench.name}-{program}-{bench.next_number()}"
    run, image = arguments if as_step else None, str(arguments["register_image"])
    bench.cluster.create("pods", body(name, program, list(words), image, bench.name, run, memory))
    return name


def running(bench: Bench, name: str) -> Object:
    """A pod, once it runs (or has ended)."""
    why = ""

    def look() -> Object | None:
        nonlocal why
        pod = bench.cluster.pod(name)
        if pod is None:
            raise Different(f"pod {name} is gone")
        why = reason(pod)
        return pod if pod["status"].get("phase", "Pending") != "Pending" else None

    try:
        return bench.until(look, f"the start of pod {name}")
    except Different as late:
        raise Different(f"{late}; it waits: {why}" if why else str(late)) from None


def body(
    name: str, program: str, words: list[str], image: str, proof: str, run: dict[str, Any] | None, memory: str
) -> Object:
    """A pod that runs a program of inside/.

    words: its arguments.  run: run arguments, for a pod with the labels, the environment and the volume of a step;
    None for one that no policy selects and that has no secrets.
    """
    mounts = [{"name": "scratch", "mountPath": "/tmp"}]  # noqa: S108  # of the container
    volumes: list[Object] = [{"name": "scratch", "emptyDir": {}}]
    if run:
        mounts.append({"name": "store", "mountPath": "/store"})
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": run["claim"]}})
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", (INSIDE / f"{program}.py").read_text(encoding="utf-8"), *words],
        "env": _environment(run) if run else [],
        "resources": {
            "requests": {"cpu": "100m", "memory": memory},
            "limits": {"cpu": "2", "memory": "4Gi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        },
        "volumeMounts": mounts,
    }  # fmt: skip
    security = {
        "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER,
        "fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch",  # else every file of the store, at every start
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    spec: Object = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": END_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": security,
        "containers": [container],
        "volumes": volumes,
    }
    labels = {LABEL: proof, PROGRAM: program, **(STEP if run else {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def _environment(run: dict[str, Any]) -> list[Object]:
    """As every step has it (pipelines.definition.harden)."""
    found: list[Object] = [{"name": name, "value": value} for name, value in given.FIXED.items()]
    for key, optional in given.ADDRESSES.items():
        source: Object = {"name": run["addresses"], "key": key, "optional": optional}
        found.append({"name": key, "valueFrom": {"configMapKeyRef": source}})
    for secret, keys in (("store_secret", given.STORE_SECRET), ("tracking_secret", given.TRACKING_SECRET)):
        for key in keys:
            source = {"name": run[secret], "key": key, "optional": True}
            found.append({"name": key, "valueFrom": {"secretKeyRef": source}})
    return found
