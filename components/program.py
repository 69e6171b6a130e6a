"""Shared code of the programs: arguments, exit codes, stop signals, Kubeflow's ExecutorOutput."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from components.outcome import outcome
from runtime import commandline, environment, stopping
from runtime.errors import Preempted, WrongParameters
from runtime.redaction import redact_output, redacted
from runtime.wording import print_in_every_locale

log = logging.getLogger("vgg")

OPEN_FILES = 65_536


class Parser(commandline.Parser):
    """If components.step runs the program, it gets the message, too."""

    def end(self, message: str) -> NoReturn:
        end(WrongParameters.exit_code, message)


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


def add_dvc_metrics(parser: argparse.ArgumentParser) -> None:
    """Add --dvc-metrics, the counterpart of --executor-input: dvc.yaml sets it, the Kubeflow pipeline does not."""
    parser.add_argument(
        "--dvc-metrics", metavar="FILE", help="out: the few numbers that DVC shows and compares, JSON; set by dvc.yaml"
    )


def _output_file(executor_input: str) -> str:
    """Path of the ExecutorOutput file.  Raises argparse.ArgumentTypeError."""
    try:
        return str(json.loads(executor_input)["outputs"]["outputFile"])
    except (ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(
            f"not an ExecutorInput with outputs.outputFile: {executor_input[:80]!r}"
        ) from None


def run(work: Callable[[], None]) -> NoReturn:
    """Run a program and exit with the code of its outcome.  A user's mistake is one message without a traceback.

    Nothing that it prints contains a password or a key.
    """
    print_in_every_locale()
    redact_output()
    _raise_limit_of_open_files()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("alembic", "mlflow", "matplotlib", "botocore", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if changed := environment.ensure_home():
        log.warning("%s", changed)
    stopping.on_stop_signal(stopping.raise_stop_requested)  # programs that stop more gently set their own handler
    try:
        expect_folder_and_environment()
        if environment.RANK.get() == 0:
            for mistake in environment.mistyped():
                log.warning("%s", mistake)
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        stopping.ignore_stop_signals()
        end(Preempted.exit_code, "interrupted; run the same command again to continue")
    except BrokenPipeError as error:
        if error.filename is None and _stdout_is_closed():  # the reader has seen enough: … | head
            sys.exit(0)
        end(*_with_prefix(error))
    except Exception as error:
        end(*_with_prefix(error))
    sys.exit(0)


def expect_folder_and_environment() -> None:
    """Raises WrongParameters if the current folder is gone or an environment variable has an invalid value."""
    try:
        os.getcwd()
    except OSError:
        raise WrongParameters("the current folder does not exist any more; change into the repository") from None
    environment.expect_valid()


def _raise_limit_of_open_files() -> None:
    """As far as the system allows: shells often set 256 or 1,024, while ranks and their workers share many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _with_prefix(error: Exception) -> tuple[int, str]:
    code, message = outcome(error)
    return code, f"{'' if isinstance(error, Preempted) else 'error: '}{message}"


def say(text: str) -> None:
    """Print.  If nobody reads any more (… | head), the program goes on: its exit code is a verdict."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout any more; then nothing is written to it at exit either."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def expect_one_process(module: str) -> None:
    """Raises WrongParameters if components.launch started several processes: each would do all the work."""
    if environment.WORLD_SIZE.get() > 1:
        raise WrongParameters(f"{module} runs as one process; start it with: python -m {module} …")


def end(exit_code: int, message: str) -> NoReturn:
    """Print the message and exit.  If components.step runs this program, it gets code and message too."""
    message = redacted(message)
    print(message, file=sys.stderr)
    if path := environment.LAST_WORDS.get():
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
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
    Path(path).write_text(json.dumps({"parameterValues": parameters, "artifacts": listed}), encoding="utf-8")


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that are numbers, for Kubeflow's UI."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _uri(path: str) -> str:
    """Address of the object behind a launcher's local path: s3://bucket/key for /s3/bucket/key."""
    for scheme in ("s3", "minio", "gcs"):
        if path.startswith(f"/{scheme}/"):
            return f"{'gs' if scheme == 'gcs' else scheme}://{path.removeprefix(f'/{scheme}/')}"
    return path
