"""What the four programs have in common: arguments, exit codes, one writer per output, stopping, executor output."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from components import signals
from vgg.errors import Interrupted, Preempted, Problem, StorageFailure, WrongParameters

log = logging.getLogger("vgg")

LAST_WORDS = "VGG_LAST_WORDS"  # environment: a file for exit codes and messages, of components.step


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of the contract for wrong usage."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(f"python -m {module}", None, description, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        end(WrongParameters.exit_code, f"{self.prog}: {message}")


class StageParser(Parser):
    """The arguments of a stage: --params first."""

    def __init__(self, stage: str, description: str | None) -> None:
        super().__init__(f"components.{stage}", description)
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
    signals.on_asked(signals.interrupt)  # what can be stopped more gently sets its own
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
        signals.ignore_asked()
        end(Preempted.exit_code, "interrupted; run the same command again to go on")
    sys.exit(0)


def expect_one_process(module: str) -> None:
    """Raises WrongParameters where torchrun (components.launch) has started several: each would do all the work."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise WrongParameters(f"{module} is one process; start it with: python -m {module} …")


def end(exit_code: int, message: str) -> NoReturn:
    """Say why, and exit.  components.step, which may stand around this program, hears of it too."""
    print(message, file=sys.stderr)
    if path := os.environ.get(LAST_WORDS):
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(json.dumps({"exit_code": exit_code, "message": message}) + "\n")
    sys.exit(exit_code)


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold the lease of an output directory; a killed holder loses it by itself.

    Raises Preempted (run again) while another process writes there.
    """
    directory = directory.resolve()  # the name of "." is empty
    path = directory.with_name(directory.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Preempted(
                f"{directory}: process {file.read().strip()} is writing there; wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class StopSignal:
    """Whether this process has been asked to stop (SIGTERM, SIGHUP, Ctrl-C): a vgg.stopping.Stop.

    A second Ctrl-C stops at once.
    beat: called whenever somebody asks, as a sign of life.
    """

    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        self.received, self._interrupting, self._beat = False, False, beat
        signals.on_asked(self._receive)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signals.interrupt)
        if self._interrupting:
            self._interrupting = False  # once: whoever cleans up is not interrupted again
            raise Interrupted

    def __call__(self) -> bool:
        self._beat()
        return self.received

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        self._interrupting = True
        try:
            if self.received:  # just before
                raise Interrupted
            yield
        finally:
            self._interrupting = False

    def raise_if_received(self) -> None:
        if self():
            raise Preempted("stopped before training began; run again")


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
