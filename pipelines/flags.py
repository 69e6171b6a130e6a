"""The command line of pipelines.submit."""

from __future__ import annotations

import argparse

from components.program import Parser
from pipelines.connection import add_connection, add_image_check, add_pace
from pipelines.definition.inputs import described
from pipelines.definition.package import NAME

COMMANDS = {  # of existing runs; the number of words that may follow
    "list": (0,),
    "wait": (1,),
    "logs": (1, 2),
    "resume": (1,),
    "cancel": (1,),
}
HELP = """for existing runs; RUN: its ID, the beginning of it, or its name
list: the newest runs
wait RUN: until it ends
logs RUN [STEP]: of its steps, in their order, or of one
resume RUN: run the failed tasks again
cancel RUN: and wait until it has ended"""


def parser(description: str | None) -> argparse.ArgumentParser:
    flags = Parser("pipelines.submit", description)
    flags.add_argument("command", nargs="*", metavar="COMMAND", help=HELP)
    what = flags.add_argument_group("what to run")
    what.add_argument("--params", default="params.yaml", metavar="FILE", help="hyperparameters (params.yaml)")
    what.add_argument(
        "-S", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a parameter"
    )
    what.add_argument(
        "-C", dest="settings", action="append", default=[], metavar="NAME=VALUE",
        help="set a run argument; VALUE is YAML.  NAME (type, default):\n" + described(),
    )  # fmt: skip
    what.add_argument("--experiment", default=NAME, metavar="NAME", help=f"Kubeflow experiment ({NAME})")
    what.add_argument("--version", metavar="NAME", help="name of the uploaded version (the commit)")
    what.add_argument("--again", action="store_true", help="start a run even if the same run is active")
    what.add_argument("--recurring", metavar="CRON", help='start runs on a schedule: "SEC MIN HOUR DAY MONTH WEEKDAY"')
    where = flags.add_argument_group("where to run")
    add_connection(where)
    where.add_argument("--ui-host", metavar="URL", help="its UI, for links (same as --host)")
    where.add_argument("--local", action="store_true", help="run on this machine, in containers")
    where.add_argument("--compile", metavar="FILE", help="do not run: write the package to FILE")
    where.add_argument(
        "--arguments", nargs="?", const="", metavar="FILE",
        help="do not run: print the run arguments for Kubeflow's page, with the params file FILE (that of --params)",
    )  # fmt: skip
    checks = flags.add_argument_group("checks and waiting")
    checks.add_argument("--preflight", action="store_true", help="check only, create nothing; exit code 0 or 78")
    add_image_check(checks)
    checks.add_argument("--no-gpu-check", action="store_true", help="nodes with GPUs are created on demand")
    checks.add_argument("--wait", action="store_true", help="wait until the run ends")
    add_pace(checks, poll=10, patience=600)
    return flags


def complete(command: list[str]) -> bool:
    """Whether these are the words of a command."""
    return bool(command) and len(command) - 1 in COMMANDS.get(command[0], ())
