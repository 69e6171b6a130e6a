"""One lease of a GPU: all that needs one, in 9 minutes 30, what matters most first.  benchmarks/gpu.sh starts it.

Parts follow each other; programs of one part run side by side.  Each part has its own limit, and the last has what is
left: a program that fails or runs over costs itself alone.  What a program says is in results.json and table.md the
moment it says it; log.txt has its messages.  Exits with 0 if every program gave its result.

With --rehearse the same programs run on a CPU with tiny sizes, before a GPU is at hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks import table
from components import signals

TOTAL_SECONDS = 570
GRACE_SECONDS = 4  # from being told to end to being ended
TABLE_SECONDS = 6  # for what comes after the last part
LOADING_SECONDS = 15  # of a part's limit a program leaves for its imports and its end
LEAST_SECONDS = 20  # with which the last part is begun
FEWER_CORES = 3  # times as long may a part take in a rehearsal
LOOK_SECONDS = 0.1
REHEARSAL_SIZE = ["--input-size", "32"]


@dataclass(frozen=True)
class Program:
    """python -m benchmarks.<command>; `name` in results and table."""

    name: str
    command: list[str]
    nice: int = 0


@dataclass(frozen=True)
class Part:
    """limit: in seconds; None: what is left."""

    limit: int | None
    programs: list[Program]


def parts(images: Path, tars: Sequence[Path], results: Path, work: Path, rehearse: bool) -> list[Part]:
    """What is worth a lease, in this order.

    CIFAR-10 is sharded and its network compiled beside the checks of the first part, at the lowest priority: nothing is
    timed there, and most of sixteen cores are idle.
    """

    def sizes(real: list[str], tiny: list[str]) -> list[str]:
        return ["--json", *(tiny if rehearse else real)]

    pictures = ["--images", str(images)]
    cifar10 = ["cifar10", *map(str, tars), "--work", str(work), "--recipe", "cifar10-bn"]
    few = ["--limit", "6", "--epochs", "4"]
    names = [Program("names", ["names", "--json"])] if rehearse else []
    return [
        Part(30, [Program("machine", ["machine"]), *names]),
        Part(60, [
            Program("decoders", ["correct", "decoders", "--json"]),
            Program("step", ["correct", "step", "--json"]),
            Program("prepare", [*cifar10, "--prepare", *sizes([], few)], nice=19),
        ]),
        Part(150, [
            Program("train", [
                "train", *pictures, "--profile", str(results / "profile.txt"),
                *sizes(["--seconds", "{seconds}"], [*REHEARSAL_SIZE, "--batch", "4", "--steps", "1", "--rounds", "1"]),
            ]),
        ]),
        Part(45, [
            Program("evaluate", [
                "evaluate", *pictures,
                *sizes(["--seconds", "{seconds}"], [*REHEARSAL_SIZE, "--batches", "1", "--rounds", "1"]),
            ]),
        ]),
        Part(45, [
            Program("loader", ["loader", *pictures, "--rounds", "1", *sizes(["--seconds", "5"], ["--seconds", "1"])]),
        ]),
        Part(60, [Program("repeated", ["correct", "repeated", "--json"])]),
        Part(None, [Program("cifar10", [*cifar10, "--seconds", "{seconds}", *sizes([], few)])]),
    ]  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser("benchmarks/gpu.sh lease", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("images", type=Path, metavar="IMAGES", help="a tar or folder of photographs, <class>/<image>")
    flags.add_argument("tars", type=Path, nargs="+", metavar="TAR", help="CIFAR-10, {train,test}/<class>/<image>.jpg")
    flags.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: to find slips, not figures")
    flags.add_argument("--only", nargs="+", metavar="NAME", help="these programs, the last of them for all the time")
    flags.add_argument("--seconds", type=int, default=TOTAL_SECONDS, help=f"for all of it (default {TOTAL_SECONDS})")
    flags.add_argument("--spent", type=int, default=0, help="of them, before this program began")
    flags.add_argument("--results", type=Path, required=True, help="a folder")
    args = flags.parse_args()
    end = time.monotonic() + args.seconds - args.spent
    args.results.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="vgg-lease-"))
    chosen = parts(args.images, args.tars, args.results, work, args.rehearse)
    known = {program.name for part in chosen for program in part.programs}
    if unknown := set(args.only or ()) - known:
        flags.error(f"no such program: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if args.only:
        wanted = {*args.only, "machine"}
        chosen = [Part(p.limit, [program for program in p.programs if program.name in wanted]) for p in chosen]
        chosen = [part for part in chosen if part.programs]
    chosen[-1] = Part(None, chosen[-1].programs)
    lease = Lease(args.results, work, args.rehearse, end)
    signals.on_asked(signals.interrupt)
    try:
        lease.run(chosen)
    except KeyboardInterrupt:
        print("== told to end", file=sys.stderr)
    finally:
        lease.write()
        print(lease.table())
        shutil.rmtree(work, ignore_errors=True)
    failed = [name for part in chosen for name in (p.name for p in part.programs) if not lease.ended_well(name)]
    rehearsal = "rehearsal, CPU: " if args.rehearse else ""
    print(f"\n{rehearsal}{'without a result: ' + ', '.join(failed) if failed else 'every program gave its result'}")
    sys.exit(1 if failed else 0)


class Lease:
    """end: by the clock of time.monotonic."""

    def __init__(self, results: Path, work: Path, rehearse: bool, end: float) -> None:
        self.results, self.work, self.rehearse, self.end = results, work, rehearse, end
        self.found: dict[str, dict[str, Any]] = {}
        self.log = open(results / "log.txt", "w")  # noqa: SIM115  (as long as this process)
        self.environment = {
            **os.environ,
            # of all programs: what one has compiled, the next finds.  (`repeated` has its own, empty ones.)
            "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"),
            **({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}),
        }

    def run(self, chosen: list[Part]) -> None:
        for part in chosen:
            limit = self.seconds_for(part)
            names = ", ".join(program.name for program in part.programs)
            if limit < LEAST_SECONDS:
                print(f"== {names}: not begun, {limit:.0f} s are left", file=sys.stderr)
                continue
            print(f"== {names}: {limit:.0f} s", file=sys.stderr, flush=True)
            self.run_part(part, limit)
            if not self.rehearse and not self.found.get("machine", {}).get("figures", {}).get("gpu"):
                print("== no GPU here. --rehearse tries all of this on a CPU.", file=sys.stderr)
                return

    def seconds_for(self, part: Part) -> float:
        left = self.end - time.monotonic() - GRACE_SECONDS - TABLE_SECONDS
        return left if part.limit is None else min(left, part.limit * (FEWER_CORES if self.rehearse else 1))

    def run_part(self, part: Part, limit: float) -> None:
        """Start all, listen, and end what is still running at the limit."""
        began = time.monotonic()
        running: list[Running] = []
        try:
            for program in part.programs:
                seconds = max(1, int(limit) - LOADING_SECONDS)
                running.append(Running(program, seconds, self.work, self.environment))
                self.found[program.name] = {"exit": None, "limit": round(limit), "figures": {}}
            over = False
            while True:
                ended = [self.listen(one, began) for one in running]
                if all(ended):
                    break
                if not over and time.monotonic() > began + limit:
                    over = True
                    for one in running:
                        self.found[one.name]["over"] = one.process.poll() is None
                        one.kill(signal.SIGTERM)
                elif over and time.monotonic() > began + limit + GRACE_SECONDS:
                    break
                time.sleep(LOOK_SECONDS)
        finally:
            for one in running:
                one.kill(signal.SIGKILL)  # and what it has left running
                one.process.wait()
                self.listen(one, began)
        self.write()
        for one in running:
            seconds, code = self.found[one.name]["seconds"], self.found[one.name]["exit"]
            print(f"== {one.name}: exit {code} after {seconds} s", file=sys.stderr, flush=True)
            if code:
                print(*one.last[-15:], sep="\n", file=sys.stderr, flush=True)

    def listen(self, one: Running, began: float) -> bool:
        """Note what a program has said since the last time; returns whether it has ended."""
        about, code = self.found[one.name], one.process.poll()
        new = False
        for line in one.said():
            with contextlib.suppress(ValueError):
                figures = json.loads(line)
                if isinstance(figures, dict):
                    about["figures"].update(figures)
                    new = True
        for line in one.messages():
            self.log.write(f"{time.strftime('%H:%M:%S')} {one.name}: {line}\n")
            self.log.flush()
        if code is not None and about["exit"] is None:
            about.update(exit=code, seconds=round(time.monotonic() - began, 1), last=one.last[-1:])
            new = True
        if new:
            self.write()
        return code is not None

    def ended_well(self, name: str) -> bool:
        return self.found.get(name, {}).get("exit") == 0

    def table(self) -> str:
        return table.of(self.found, self.rehearse)

    def write(self) -> None:
        about = {"rehearsal": self.rehearse, "programs": self.found}
        for name, text in (("results.json", json.dumps(about, indent=1)), ("table.md", self.table())):
            beside = self.results / f"{name}.new"
            beside.write_text(text + "\n")
            beside.replace(self.results / name)


@dataclass
class Running:
    """A program in a process group of its own, its output in files: a pipe would be held open by what it leaves."""

    program: Program
    seconds: int
    work: Path
    environment: dict[str, str]
    last: list[str] = field(default_factory=list)  # lines of its messages

    def __post_init__(self) -> None:
        self.name = self.program.name
        paths = [self.work / f"{self.name}.{kind}" for kind in ("out", "err")]
        command = [word.replace("{seconds}", str(self.seconds)) for word in self.program.command]
        with open(paths[0], "w") as out, open(paths[1], "w") as err:
            self.process = subprocess.Popen(
                ["nice", "-n", str(self.program.nice), sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=self.environment, start_new_session=True,
            )  # fmt: skip
        self._out, self._err = (Lines(open(path, errors="replace")) for path in paths)  # noqa: SIM115

    def said(self) -> list[str]:
        return self._out.new(self.process.returncode is not None)

    def messages(self) -> list[str]:
        found = self._err.new(self.process.returncode is not None)
        self.last = [*self.last, *(line for line in found if line.strip())][-100:]
        return found

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Lines:
    """A file that another process writes, line by line."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._begun = file, ""

    def new(self, ended: bool) -> list[str]:
        """Lines that have come; ended: the last may lack its end."""
        *lines, self._begun = (self._begun + self._file.read()).split("\n")
        if ended and self._begun:
            lines, self._begun = [*lines, self._begun], ""
        return lines


if __name__ == "__main__":
    main()
