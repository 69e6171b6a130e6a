"""Run a program as a step of a pipeline, and retry it if its exit code says that this may help.

    python -m components.step [--image REFERENCE] [--attempts N] [--backoff-seconds S] MODULE ARGUMENTS…

Orchestrators retry after any exit code but 0.  Here a wrong parameter ends the step at once, while a store that cannot
be reached for ten minutes does not.  If the whole pod is lost (eviction, node failure), the orchestrator repeats the
step and the program continues where it stopped.  SIGTERM is forwarded to the program; nothing is retried after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from components import program
from runtime import environment, stopping
from runtime.errors import Preempted, StorageFailure, Unreachable
from runtime.redaction import redacted
from runtime.stopping import die_with_parent

log = logging.getLogger("vgg.step")

RETRIED_CODES = {Unreachable.exit_code, StorageFailure.exit_code, Preempted.exit_code}
MAX_BACKOFF_SECONDS = 900
POLL_SECONDS = 0.5
TERMINATION_LOG = Path("/dev/termination-log")  # Kubernetes mounts it in every container
MAX_MESSAGE_BYTES = 2048  # Kubernetes keeps the last 4096
PROGRESS_SECONDS = 3600  # an attempt that lasted this long made progress: the count of failures restarts


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.step", __doc__)
    flags.add_argument("--image", default="", metavar="REFERENCE", help="image of this step, for the provenance record")
    flags.add_argument("--attempts", type=int, default=6, metavar="N", help="attempts at most (default 6)")
    flags.add_argument(
        "--backoff-seconds",
        type=float,
        default=30,
        metavar="S",
        help="pause after the first attempt, doubled after each (default 30)",
    )
    flags.add_argument(
        "--last-words", type=Path, default=TERMINATION_LOG, metavar="FILE",
        help=f"file that gets exit code and message on failure, if it exists (default {TERMINATION_LOG})",
    )  # fmt: skip
    flags.add_argument("module", help="program to run, for example components.shard")
    flags.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the program")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Run a program, with retries; returns the exit code of the last attempt."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if args.image:
        os.environ[environment.IMAGE.name] = args.image
    with tempfile.NamedTemporaryFile(prefix="vgg-words-") as last_words:
        os.environ[environment.LAST_WORDS.name] = last_words.name
        code = run_with_retries(args, Path(last_words.name))
        if code:
            failed = f"{args.module}: exit code {code}"  # pipelines.kfp.failure searches for it
            log.error("%s", failed)
            message = message_of(code, Path(last_words.name))
            write_termination_message(args.last_words, f"{failed}: {message}" if message else failed)
    return code


def run_with_retries(args: argparse.Namespace, last_words: Path) -> int:
    """Run the program until it succeeds, fails in a way that a retry does not help, or has no attempts left.

    last_words: file for code and message of the last attempt.  Returns the exit code of that attempt.
    """
    step = Step([sys.executable, "-m", args.module, *args.arguments])
    failures = 0
    while True:
        last_words.write_text("", encoding="utf-8")
        started = time.monotonic()
        code = step.attempt()
        failures = 1 if time.monotonic() - started > PROGRESS_SECONDS else failures + 1
        if step.stopped() or code not in RETRIED_CODES or failures >= args.attempts:
            return code
        seconds = min(args.backoff_seconds * 2 ** (failures - 1), MAX_BACKOFF_SECONDS)
        log.warning(
            "%s failed with exit code %d; retrying in %g s (attempt %d of %d)",
            args.module, code, seconds, failures + 1, args.attempts,
        )  # fmt: skip
        if step.wait(seconds):
            return code


def message_of(code: int, last_words: Path) -> str:
    """Message of the program for this exit code, '' if none.  Of several ranks, the first one's."""
    for line in last_words.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a killed process, a full disk
            entry = json.loads(line)
            if entry["exit_code"] == code:
                return str(entry["message"])
    return ""


def write_termination_message(path: Path, text: str) -> None:
    """Write the message that Kubernetes copies to the pod's status and Argo from there to the workflow's.

    The exit code alone would be lost: Kubeflow's launcher (2.17), which runs this program, exits with 1 for any other.
    """
    if path.exists():
        with contextlib.suppress(OSError):
            path.write_bytes(redacted(text).encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore").encode())


class Step:
    """Runs one program at a time and forwards stop signals to it."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._stopped = False
        self._running: subprocess.Popen[bytes] | None = None
        stopping.on_stop_signal(self._forward)

    def stopped(self) -> bool:
        """Whether a stop signal was received."""
        return self._stopped

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self._stopped = True
        if self._running:
            self._running.send_signal(number)

    def attempt(self) -> int:
        """Run the program to its end; returns its exit code, 128 + n for one that signal n ended."""
        if self.stopped():
            return Preempted.exit_code
        self._running = subprocess.Popen(self._command, preexec_fn=die_with_parent)  # safe: no threads
        if self.stopped():  # a signal arrived during the start
            self._running.send_signal(signal.SIGTERM)
        code = self._running.wait()
        return code if code >= 0 else 128 - code

    def wait(self, seconds: float) -> bool:
        """Wait before the next attempt.  Returns whether a stop signal was received."""
        until = time.monotonic() + seconds
        while not self.stopped() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
        return self.stopped()


if __name__ == "__main__":
    program.run(lambda: sys.exit(main()))
