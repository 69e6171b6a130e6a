"""Run one process per GPU and watch them.

    python -m components.launch [--nodes N | --max-restarts N] PROCESSES MODULE ARGUMENTS…

With --nodes N it is one of N launchers, one per machine (the pods of a TrainJob), each with PROCESSES processes.

torchrun starts the ranks.  This program adds:
- If a rank hangs (no heartbeat for VGG_HANG_SECONDS, 1200 by default), the stacks of all ranks are written to files and
  all ranks are ended.
- The exit code is that of the program, because orchestrators decide on retries by it.
- After a crash or a hang (never after a refusal) all ranks restart, at most --max-restarts times, and continue from the
  last checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys

from components import program
from runtime.errors import BadData, Refused, WrongParameters
from runtime.ranks.launch import run_once
from runtime.ranks.nodes import from_environment

log = logging.getLogger("vgg.launch")

FINAL = {0, WrongParameters.exit_code, BadData.exit_code, Refused.exit_code}  # a restart would not help


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.launch", __doc__)
    flags.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="restarts after crashes and hangs (default 0)"
    )
    flags.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="machines (default 1); PET_* identify this one"
    )
    flags.add_argument("processes", type=int, help="ranks on this machine, one per GPU")
    flags.add_argument("module", help="program to run, for example components.train")
    flags.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the program")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Run a program in several processes; returns the exit code of the first that failed.

    Raises WrongParameters, and Preempted if other nodes are missing or were lost.
    """
    args = parser().parse_args(argv)
    if args.processes < 1 or args.max_restarts < 0 or args.nodes < 1:
        parser().error("PROCESSES must be 1 or more, --nodes 1 or more, --max-restarts 0 or more")
    if args.nodes > 1 and args.max_restarts:
        parser().error("--max-restarts is for one node; the runtime of a TrainJob restarts all its pods together")
    if not _is_module(args.module):
        parser().error(f"MODULE: no module named {args.module!r}; for example components.train")
    nodes = from_environment(args.nodes) if args.nodes > 1 else None
    for left in range(args.max_restarts, -1, -1):
        code, stopped = run_once(args.processes, args.module, args.arguments, nodes)
        if stopped or code in FINAL or not left:
            break
        log.warning("exit code %d; restarting all ranks (%d restarts left)", code, left - 1)
    return code


def _is_module(name: str) -> bool:
    """Whether `python -m name` would find it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its package
        return False


if __name__ == "__main__":
    program.run(lambda: sys.exit(main()))
