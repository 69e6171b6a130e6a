"""pipelines.submit from Python."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import flags
from pipelines.definition.package import NAME

if TYPE_CHECKING:
    from pipelines.kfp.runs import Pipelines
    from pipelines.kfp.steplogs import StepLog


class Kubeflow:
    """One Kubeflow Pipelines and what is done with its runs: the commands of pipelines.submit.

        from pipelines import submit
        kubeflow = submit.Kubeflow("http://localhost:8888")
        run = kubeflow.submit("recipes/imagenet-a-256.yaml", {"train.epochs": 1}, images="/store/imagenet", gpus=8)
        kubeflow.wait(run)

    Address and credentials default to KF_PIPELINES_… (pipelines/kfp/access.py).  A run is given by its ID, the
    beginning of it, or its name.  Progress goes to the logger vgg.submit: logging.basicConfig(level="INFO") shows it.
    Every method raises what the program exits with, a runtime.errors.Problem with exit_code: Unreachable, Refused,
    WrongParameters, Preempted, and RunFailed of wait.
    """

    def __init__(
        self,
        host: str | None = None,
        *,
        namespace: str | None = None,
        token_file: str | None = None,
        experiment: str = NAME,
        service_account: str | None = None,
        kube_context: str | None = None,
        poll: float = 10.0,
        patience: float = 600.0,
    ) -> None:
        """As the flags of the same names.  Nothing is asked before the first call of a method."""
        self._args = flags.parser(None).parse_args([])
        vars(self._args).update(
            host=host, namespace=namespace, token_file=token_file, experiment=experiment,
            service_account=service_account, kube_context=kube_context, poll=poll, patience=patience,
        )  # fmt: skip

    def submit(
        self,
        params: str = "params.yaml",
        parameters: Mapping[str, Any] | None = None,
        *,
        again: bool = False,
        version: str | None = None,
        image_check: bool = True,
        gpu_check: bool = True,
        **arguments: Any,
    ) -> str:
        """Check, upload and start; returns the run's ID, of the active one if it is the same.

        params: params file.  parameters: changes of it, as -S.  arguments: run arguments, as -C.
        """
        from pipelines import submit

        args = self._copy(params=params, again=again, version=version)
        args.no_image_check, args.no_gpu_check = not image_check, not gpu_check
        args.overrides = _assignments(parameters or {})
        args.settings = _assignments(arguments)
        return submit.submit(args)

    def runs(self, limit: int = 20) -> list[dict[str, Any]]:
        """The newest runs: id, name, state, created (datetime, UTC)."""
        from pipelines.kfp import find

        return [
            {"id": run.run_id, "name": run.display_name, "state": find.state(run), "created": run.created_at}
            for run in find.newest(self._connect(), self._args.experiment, limit)
        ]

    def wait(self, run: str) -> None:
        """Until it has succeeded.  Raises RunFailed with the failed tasks and their last log lines, Preempted if it was
        canceled."""
        from pipelines import submit

        pipelines, run_id = self._find(run)
        submit.wait(self._args, pipelines, run_id)

    def logs(self, run: str, step: str | None = None) -> list[StepLog]:
        """Every attempt of every step, or of one, in the order of the pipeline; print() of one is what logs prints."""
        from pipelines import submit
        from pipelines.kfp import steplogs

        pipelines, run_id = self._find(run)
        cluster = submit.access_to_pods(self._args)
        return list(steplogs.read(pipelines.server, pipelines.get(run_id), step, cluster))

    def resume(self, run: str) -> str:
        """Run the failed tasks again; returns the run's ID."""
        pipelines, run_id = self._find(run)
        pipelines.resume(run_id)
        return run_id

    def cancel(self, run: str) -> list[str]:
        """Stop it and wait until its pods have ended; returns lines about what remains."""
        from pipelines import submit
        from pipelines.kfp import cancel

        pipelines, run_id = self._find(run)
        return cancel.cancel(pipelines, run_id, self._args.poll, submit.access_to_pods(self._args))

    def _connect(self) -> Pipelines:
        from pipelines import submit
        from pipelines.kfp.access import Access

        return submit.connect(self._args, Access(self._args.host, self._args.token_file))

    def _find(self, run: str) -> tuple[Pipelines, str]:
        from pipelines.kfp import find

        pipelines = self._connect()
        return pipelines, find.run_id(pipelines, run)

    def _copy(self, **changes: Any) -> argparse.Namespace:
        return argparse.Namespace(**{**vars(self._args), **changes})


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]  # JSON is YAML
