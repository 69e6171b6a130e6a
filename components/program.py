"""What the four programs have in common: arguments, exit codes, one writer per output, stopping, executor output."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from runtime import environment, stopping
from runtime.errors import Preempted, Problem, StorageFailure, WrongParameters

log = logging.getLogger("vgg")


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of the contract for wrong usage."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(f"python -m {module}", None, description, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        end(WrongParameters.exit_code, f"{self.prog}: {message}")


class StageParser(Parser):
    """The arguments of a stage: --params first."""

    def __init__(self, stage: str, description: str | None, module: str | None = None) -> None:
        """module: whose program it is, if not components.<stage>."""
        super().__init__(module or f"components.{stage}", description)
        self.add_argument(
            "--params",
            required=True,
            help=f"params.yaml, or its section {stage!r} as JSON (python -m vgg.params explains)",
        )


def add_executor_input(parser: argparse.ArgumentParser) -> None:
    """Last of all flags: what Kubeflow says of the task, parsed to the file in which it wants to hear of its outputs.

    It is the whole ExecutorInput, {{$}}: that file by itself has a placeholder too, {{$.outputs.output_file}}, but only
    kfp.local knows it; the launcher of a cluster (2.17) leaves it as it is.
    """
    parser.add_argument(
        "--executor-input", dest="executor_output", type=_output_file, metavar="JSON",
        help="Kubeflow's ExecutorInput; its outputs.outputFile gets the ExecutorOutput; set by the pipeline",
    )  # fmt: skip


def _output_file(executor_input: str) -> str:
    """Raises argparse.ArgumentTypeError."""
    try:
        return str(json.loads(executor_input)["outputs"]["outputFile"])
    except (ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(
            f"no ExecutorInput of Kubeflow with outputs.outputFile: {executor_input[:80]!r}"
        ) from None


def run(work: Callable[[], None]) -> NoReturn:
    """Do a program's work and exit with the code of the contract.  A user's mistake is one message, no traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("alembic", "mlflow", "matplotlib", "botocore", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    stopping.on_stop_signal(stopping.raise_stop_requested)  # what can be stopped more gently sets its own
    try:
        work()
    except Problem as problem:
        end(problem.exit_code, f"{'' if isinstance(problem, Preempted) else 'error: '}{problem}")
    except OSError as error:  # what is not foreseen is still a path and a reason, not a traceback
        if error.filename is None:
            raise
        where = f"{error.filename}: {error.strerror}"
        end(StorageFailure.exit_code, f"error: {where}. Check that it exists, is writable and has room.")
    except KeyboardInterrupt:
        stopping.ignore_stop_signals()
        end(Preempted.exit_code, "interrupted; run the same command again to go on")
    sys.exit(0)


def expect_one_process(module: str) -> None:
    """Raises WrongParameters where torchrun (components.launch) has started several: each would do all the work."""
    if environment.WORLD_SIZE.get() > 1:
        raise WrongParameters(f"{module} is one process; start it with: python -m {module} …")


def end(exit_code: int, message: str) -> NoReturn:
    """Say why, and exit.  components.step, which may stand around this program, hears of it too."""
    print(message, file=sys.stderr)
    if path := environment.LAST_WORDS.get():
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(json.dumps({"exit_code": exit_code, "message": message}) + "\n")
    sys.exit(exit_code)


def write_executor_output(
    path: str | None, parameters: dict[str, str], artifacts: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    """Tell Kubeflow of output parameters and artifacts, in the one form the cluster and kfp.local both read.

    path: of the ExecutorOutput JSON, None outside of Kubeflow.  artifacts: by name, the file and what Kubeflow's pages
    show of it.
    """
    if path is None:
        return
    listed = {
        name: {"artifacts": [{"name": name, "uri": _uri(file), "metadata": metadata}]}
        for name, (file, metadata) in artifacts.items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"parameterValues": parameters, "artifacts": listed}))


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """What Kubeflow's page shows of metrics."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _uri(path: str) -> str:
    """The object a launcher's local path stands for: /s3/bucket/key is s3://bucket/key."""
    for scheme in ("s3", "minio", "gcs"):
        if path.startswith(f"/{scheme}/"):
            return f"{'gs' if scheme == 'gcs' else scheme}://{path.removeprefix(f'/{scheme}/')}"
    return path
