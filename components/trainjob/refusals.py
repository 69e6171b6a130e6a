"""What the Kubernetes API refuses, explained; and which of its errors are worth another attempt."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any

from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError

from runtime.errors import Problem, Refused, Unreachable, WrongParameters

# Refusals that share their status with others, so that only the text tells them apart.
# tests/components/test_trainjob.py has the whole messages with their sources.
TEXTS = {
    # 403, kube-apiserver, written for any authorizer.  Quotas and admission webhooks answer 403 with other texts.
    "not authorized": re.compile(r'User ".*" cannot \S+ (resource|path) '),
    # 403, kube-apiserver that answers before it has loaded the roles, as for seconds after a restart (1.34)
    "no roles yet": re.compile(r'clusterrole\S* "system:[a-z-]+" not found'),
    # 400, kube-apiserver with strict field validation (stable in 1.27), if the CRD is that of Trainer 2.0 or 2.1
    "no runtimePatches": re.compile(r'unknown field "spec\.runtimePatches'),
    # 403 or 422, validating webhook of Trainer 2.0.0-2.3.0
    "no runtime": re.compile(r"must be created before the TrainJob"),
}


class ApiErrors:
    """A runtime.retry.Classifier."""

    errors: tuple[type[Exception], ...] = (ApiException, HTTPError, OSError)

    def __init__(self, what: str, namespace: str, granted: Container[str] = ()) -> None:
        """granted: what the API has allowed before."""
        self.what, self.namespace, self.granted = what, namespace, granted

    def is_temporary(self, error: Exception) -> bool:
        if not isinstance(error, ApiException):
            return True
        if error.status in (401, 403):
            return self.what in self.granted or bool(TEXTS["no roles yet"].search(brief(error)))
        return error.status in (0, 408, 429) or error.status >= 500  # 0: no HTTP answer

    def refusal(self, error: Exception) -> Problem:
        return explain(error, self.what, self.namespace)

    def gave_up(self, error: Exception, seconds: float) -> Problem:
        if isinstance(error, ApiException) and error.status in (401, 403):
            return self.refusal(error)
        return Unreachable(
            f"the Kubernetes API has not answered for {seconds:.0f} s ({self.brief(error)}). A TrainJob that exists "
            "continues; run again to follow it."
        )

    def brief(self, error: Exception) -> str:
        return f"{self.what}: {brief(error)}"


def explain(error: Any, what: str, namespace: str) -> Problem:
    """The message of a refusal (an ApiException)."""
    reason = brief(error)
    if error.status == 401:
        return Refused(f"{what}: the Kubernetes API does not accept the credentials ({reason}). Check the account.")
    if error.status == 403 and TEXTS["not authorized"].search(reason):
        return Refused(
            f"{what}, in namespace {namespace}: {reason}. deploy/ ships the Role and RoleBinding that the step's "
            "service account needs; apply them to this namespace."
        )
    if error.status == 404 and what.endswith("trainjobs"):
        return Refused(
            f"{what}: {reason}. Kubeflow Trainer 2.2 or later has to be installed in the cluster: training on several "
            "nodes creates a TrainJob."
        )
    if TEXTS["no runtimePatches"].search(reason):
        return Refused(f"{what}: {reason}. This needs Kubeflow Trainer 2.2 or later; the cluster has an older one.")
    if TEXTS["no runtime"].search(reason):
        return Refused(
            f"{what}: {reason}. deploy/components/trainer ships the TrainingRuntime; apply it to namespace {namespace}."
        )
    if error.status in (400, 422):
        return WrongParameters(f"{what}: {reason}. Check the step's arguments for nodes, CPU, memory and GPUs.")
    return Refused(f"{what}: {reason}")


def brief(error: Exception) -> str:
    """The message of the API, or the error of the network."""
    if not isinstance(error, ApiException):
        return str(error).rstrip(".")
    text = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:300]
    return f"{error.status} {error.reason}{': ' if message else ''}{message}".rstrip(".")
