"""Shared code of the programs: arguments, exit codes, stop signals, Kubeflow's ExecutorOutput."""

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
    """argparse that exits with the code of WrongParameters on wrong usage."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(f"python -m {module}", None, description, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        end(WrongParameters.exit_code, f"{self.prog}: {message}")


class StageParser(Parser):
    """Arguments of a stage, --params first."""

    def __init__(self, stage: str, description: str | None, module: str | None = None) -> None:
        """module: of the program, if not components.<stage>."""
        super().__init__(module or f"components.{stage}", description)
        self.add_argument(
            "--params",
            required=True,
            help=f"params.yaml, or its section {stage!r} as JSON (explained by: python -m vgg.params)",
        )


def add_executor_input(parser: argparse.ArgumentParser) -> None:
    """Add --executor-input, always the last flag.  Its value is parsed to the path of the ExecutorOutput file.

    It takes the whole ExecutorInput, {{$}}: the placeholder for the path alone, {{$.outputs.output_file}}, works only
    with kfp.local; the launcher of a cluster (2.17) does not replace it.
    """
    parser.add_argument(
        "--executor-input", dest="executor_output", type=_output_file, metavar="JSON",
        help="Kubeflow's ExecutorInput, set by the pipeline; the ExecutorOutput goes to its outputs.outputFile",
    )  # fmt: skip


def _output_file(executor_input: str) -> str:
    """Path of the ExecutorOutput file.  Raises argparse.ArgumentTypeError."""
    try:
        return str(json.loads(executor_input)["outputs"]["outputFile"])
    except (ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(
            f"not an ExecutorInput with outputs.outputFile: {executor_input[:80]!r}"
        ) from None


def run(work: Callable[[], None]) -> NoReturn:
    """Run a program and exit with the code of its outcome.  A user's mistake is one message without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("alembic", "mlflow", "matplotlib", "botocore", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    stopping.on_stop_signal(stopping.raise_stop_requested)  # programs that stop more gently set their own handler
    try:
        work()
    except Problem as problem:
        end(problem.exit_code, f"{'' if isinstance(problem, Preempted) else 'error: '}{problem}")
    except OSError as error:  # unforeseen, but path and reason say more than a traceback
        if error.filename is None:
            raise
        where = f"{error.filename}: {error.strerror}"
        end(StorageFailure.exit_code, f"error: {where}. Check that it exists, is writable and has free space.")
    except KeyboardInterrupt:
        stopping.ignore_stop_signals()
        end(Preempted.exit_code, "interrupted; run the same command again to continue")
    sys.exit(0)


def expect_one_process(module: str) -> None:
    """Raises WrongParameters if components.launch started several processes: each would do all the work."""
    if environment.WORLD_SIZE.get() > 1:
        raise WrongParameters(f"{module} runs as one process; start it with: python -m {module} …")


def end(exit_code: int, message: str) -> NoReturn:
    """Print the message and exit.  If components.step runs this program, it gets code and message too."""
    print(message, file=sys.stderr)
    if path := environment.LAST_WORDS.get():
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(json.dumps({"exit_code": exit_code, "message": message}) + "\n")
    sys.exit(exit_code)


def write_executor_output(
    path: str | None, parameters: dict[str, str], artifacts: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    """Report output parameters and artifacts to Kubeflow, in the form that both a cluster and kfp.local read.

    path: of the ExecutorOutput JSON; None outside Kubeflow.  artifacts: by name, file and metadata shown by Kubeflow's
    UI.
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
    """The metrics that are numbers, for Kubeflow's UI."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _uri(path: str) -> str:
    """Address of the object behind a launcher's local path: s3://bucket/key for /s3/bucket/key."""
    for scheme in ("s3", "minio", "gcs"):
        if path.startswith(f"/{scheme}/"):
            return f"{'gs' if scheme == 'gcs' else scheme}://{path.removeprefix(f'/{scheme}/')}"
    return path
