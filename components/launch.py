"""One process a GPU, watched: python -m components.launch [--nodes N | --max-restarts N] PROCESSES MODULE ARGUMENTS…

With --nodes N it runs on N machines at once, each with so many processes: in the pods of a TrainJob.

torchrun starts the ranks.  What it does not do is done here: a rank that hangs (VGG_HANG_SECONDS without a sign of
life, 1200 by default) has its stacks and those of all others written down, then all are ended; the exit code is the one
of the contract that the program gave, because an orchestrator retries by it; and after a crash or a hang (never after
a refusal) all start again, at most N times, and go on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import sys

from components import program
from runtime.errors import BadData, Refused, WrongParameters
from runtime.ranks.launch import run_once
from runtime.ranks.nodes import from_environment

log = logging.getLogger("vgg.launch")

FINAL = {0, WrongParameters.exit_code, BadData.exit_code, Refused.exit_code}  # starting again would change nothing


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.launch", __doc__)
    flags.add_argument("--max-restarts", type=int, default=0, metavar="N", help="after crashes and hangs (default 0)")
    flags.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="machines (default 1); PET_* say which is this"
    )
    flags.add_argument("processes", type=int, help="ranks on this machine: as many as it has GPUs")
    flags.add_argument("module", help="whose program runs, for example components.train")
    flags.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Run a module's program in some processes; returns the exit code of the first that failed.

    Raises WrongParameters, and Preempted when other nodes did not come or have gone.
    """
    args = parser().parse_args(argv)
    if args.processes < 1 or args.max_restarts < 0 or args.nodes < 1:
        parser().error("PROCESSES must be 1 or more, --nodes 1 or more, --max-restarts 0 or more")
    if args.nodes > 1 and args.max_restarts:
        parser().error("--max-restarts is for one node; the pods of a TrainJob start again together, by its runtime")
    nodes = from_environment(args.nodes) if args.nodes > 1 else None
    for left in range(args.max_restarts, -1, -1):
        code, stopped = run_once(args.processes, args.module, args.arguments, nodes)
        if stopped or code in FINAL or not left:
            break
        log.warning("ended with %d; all ranks start again (%d restarts left)", code, left - 1)
    return code


if __name__ == "__main__":
    program.run(lambda: sys.exit(main()))
