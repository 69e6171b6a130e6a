"""A program as a step of a pipeline: run again where its exit code says so, and only there.

    python -m components.step [--image REFERENCE] [--attempts N] [--backoff-seconds S] MODULE ARGUMENTS…

Orchestrators retry whatever exits with something else than 0; here a wrong parameter ends the step at once, and a store
that is away for ten minutes does not.  What takes the whole pod away (eviction, a lost node) is the orchestrator's to
repeat; the program goes on where it was.  SIGTERM is passed on, and nothing is repeated after it.
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
from runtime.stopping import die_with_parent

log = logging.getLogger("vgg.step")

AGAIN = {Unreachable.exit_code, StorageFailure.exit_code, Preempted.exit_code}
LONGEST_BACKOFF_SECONDS = 900
LOOK_SECONDS = 0.5
TERMINATION_LOG = Path("/dev/termination-log")  # Kubernetes mounts it in every container
MOST_BYTES = 2048  # it keeps 4096, and cuts at the front
PROGRESS_SECONDS = 3600  # an attempt that lasted this long did something: the count begins anew


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.step", __doc__)
    flags.add_argument("--image", default="", metavar="REFERENCE", help="what this runs in, for the provenance record")
    flags.add_argument("--attempts", type=int, default=6, metavar="N", help="of the program (default 6)")
    flags.add_argument(
        "--backoff-seconds", type=float, default=30, metavar="S", help="before the second; doubled each time (30)"
    )
    flags.add_argument(
        "--last-words", type=Path, default=TERMINATION_LOG, metavar="FILE",
        help=f"gets exit code and message if it fails, where it is there ({TERMINATION_LOG})",
    )  # fmt: skip
    flags.add_argument("module", help="whose program runs, for example components.shard")
    flags.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Run a program, perhaps several times; returns the exit code of the last."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if args.image:
        os.environ[environment.IMAGE.name] = args.image
    with tempfile.NamedTemporaryFile(prefix="vgg-words-") as words:
        os.environ[environment.LAST_WORDS.name] = words.name
        code = repeated(args, Path(words.name))
        if code:
            failed = f"{args.module}: exit code {code}"  # pipelines.kfp.failure looks for it
            log.error("%s", failed)
            leave(args.last_words, f"{failed}: {message_of(code, Path(words.name))}".removesuffix(": "))
    return code


def repeated(args: argparse.Namespace, words: Path) -> int:
    """Run the program until its exit code says that nothing more would help; returns that.

    words: file for what its last run says of its end.
    """
    step = Step([sys.executable, "-m", args.module, *args.arguments])
    failures = 0
    while True:
        words.write_text("")
        began = time.monotonic()
        code = step.attempt()
        failures = 1 if time.monotonic() - began > PROGRESS_SECONDS else failures + 1
        if step.stopped() or code not in AGAIN or failures >= args.attempts:
            return code
        seconds = min(args.backoff_seconds * 2 ** (failures - 1), LONGEST_BACKOFF_SECONDS)
        log.warning(
            "%s ended with %d; again in %g s (attempt %d of %d)",
            args.module, code, seconds, failures + 1, args.attempts,
        )  # fmt: skip
        if step.rest(seconds):
            return code


def message_of(code: int, words: Path) -> str:
    """What the program said as it ended with this code; of several ranks, the first that did.  '' if nothing."""
    for line in words.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # who is killed writes half a line
            said = json.loads(line)
            if said["exit_code"] == code:
                return str(said["message"])
    return ""


def leave(path: Path, text: str) -> None:
    """Where Kubernetes takes it into the pod's status, and Argo from there into the workflow's.

    An exit code alone would be lost: Kubeflow's launcher (2.17), which stands around this, ends with 1 after any.
    """
    if path.exists():
        with contextlib.suppress(OSError):
            path.write_bytes(text.encode()[:MOST_BYTES].decode(errors="ignore").encode())


class Step:
    """One program at a time, and whoever asks it to end."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._told = False
        self._running: subprocess.Popen[bytes] | None = None
        stopping.on_stop_signal(self._pass_on)

    def stopped(self) -> bool:
        """Whether it has been told to stop."""
        return self._told

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._told = True
        if self._running:
            self._running.send_signal(number)

    def attempt(self) -> int:
        """Run the program to its end; returns its exit code, 128 + n for one that signal n ended."""
        if self.stopped():
            return Preempted.exit_code
        self._running = subprocess.Popen(self._command, preexec_fn=die_with_parent)  # no threads here
        if self.stopped():  # while it started
            self._running.send_signal(signal.SIGTERM)
        code = self._running.wait()
        return code if code >= 0 else 128 - code

    def rest(self, seconds: float) -> bool:
        """Wait before the next attempt.  Returns whether to stop instead."""
        until = time.monotonic() + seconds
        while not self.stopped() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
        return self.stopped()


if __name__ == "__main__":
    sys.exit(main())
