"""Checks of what is around a run: the network of a step, and the registered model."""

from __future__ import annotations

from urllib.parse import urlsplit

from pipelines.prove import pods
from pipelines.prove.bench import Bench, Different, NotTried
from pipelines.prove.objects import Object

LISTENER_PORT, SERVER_PORT = 9999, 8080
LITTLE = "64Mi"  # memory of Python alone
STEP_REACHES = (  # services of Kubeflow and Kubernetes that Kubeflow's launcher needs
    "ml-pipeline.kubeflow:8888", "ml-pipeline.kubeflow:8887", "metadata-grpc-service.kubeflow:8080",
    "kubernetes.default:443",
)  # fmt: skip
FORBIDDEN = ("ml-pipeline-ui.kubeflow:80", "169.254.169.254:80")  # Kubeflow's pages; the node's credentials
TRACKING = "mlflow"  # the host of the tracking server of deploy/
ENOUGH = 0.9  # of the digits served


def policies(bench: Bench) -> str:
    """From a pod with a step's labels.  A pod without labels shows that what the step must not reach is there."""
    bench.make_addresses()
    name = pods.start(bench, "listen", str(LISTENER_PORT), as_step=False, memory=LITTLE)
    try:
        return _reached(bench, pods.running(bench, name))
    finally:
        bench.cluster.delete("pods", name)


def _reached(bench: Bench, listener: Object) -> str:
    address = f"{_bracketed(listener['status']['podIP'])}:{LISTENER_PORT}"
    addresses = bench.cluster.config_map(bench.name) or {}
    needed = [*STEP_REACHES, *filter(None, map(_host_and_port, map(addresses.get, _SERVICES)))]
    step = pods.inside(bench, "reach", *needed, address, *FORBIDDEN, memory=LITTLE)
    control = pods.inside(bench, "reach", *needed, address, *FORBIDDEN, as_step=False, memory=LITTLE)
    wrong = [f"a step does not reach {one} ({step[one]})" for one in needed if step[one] != "open"]
    wrong += [f"a step reaches {one}, which it must not" for one in (address, *FORBIDDEN) if step[one] == "open"]
    for one in needed:
        if one.startswith(f"{TRACKING}:") and control[one] == "open":
            wrong.append(f"any pod reaches {one}, which only steps and nodes may")
    if wrong:
        raise Different("; ".join(wrong))
    if control[address] != "open":
        raise NotTried(f"even a pod that no policy selects does not reach another one ({control[address]})")
    unknown = [one for one in FORBIDDEN if control[one] != "open"]
    said = f"reaches {', '.join(needed)}; not {', '.join([address, *(set(FORBIDDEN) - set(unknown))])}"
    return said + (f"; says nothing, as no pod reaches them: {', '.join(unknown)}" if unknown else "")


def served(bench: Bench) -> str:
    found = pods.inside(bench, "served", f"models:/{bench.name}@champion", str(SERVER_PORT), memory="2Gi")
    said = f"{found['right']} of {found['asked']} digits right after {found['seconds']:.0f} s"
    if found["right"] < ENOUGH * found["asked"]:
        raise Different(said)
    return said


_SERVICES = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL")  # of the addresses


def _host_and_port(uri: str | None) -> str:
    """'' if it is no address of a server."""
    parts = urlsplit(uri or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return ""
    return f"{_bracketed(parts.hostname)}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
