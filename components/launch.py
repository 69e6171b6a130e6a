"""One process a GPU, with the exit codes of the contract: python -m components.launch 8 components.train --params …

torchrun turns every failure into 1; an orchestrator that retries by exit code needs to hear what the program said.
"""

from __future__ import annotations

import os
import signal
import sys

from vgg.errors import Preempted, WrongParameters


def main(argv: list[str]) -> int:
    """Run a module's program in argv[0] processes; returns the exit code of the first that failed."""
    if len(argv) < 2 or not argv[0].isdigit() or int(argv[0]) < 1:
        print("usage: python -m components.launch PROCESSES MODULE ARGUMENTS…", file=sys.stderr)
        return WrongParameters.exit_code
    if int(argv[0]) == 1:
        os.execv(sys.executable, [sys.executable, "-m", *argv[1:]])  # noqa: S606  # this very program, in place
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", f"--nproc-per-node={argv[0]}", "-m", *argv[1:]])
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        # the launcher ends the others with SIGTERM, which they answer with 75: the first is the one that counts
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as stopped:
        return Preempted.exit_code if stopped.sigval == signal.SIGTERM else 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
