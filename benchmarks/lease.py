"""Everything that needs a GPU, in 9 minutes 30, the most important first.  benchmarks/gpu.sh starts it.

Parts run one after the other; the programs of a part run at the same time.  Every part has its own time limit, the last
one the rest of the time: a program that fails or exceeds its limit does not affect the others.  Figures are written to
results.json and table.md as soon as a program prints them, messages to log.txt.  Exits with 0 if all programs succeed.

With --rehearse the same programs run on a CPU with tiny sizes, to try them without a GPU.
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
from runtime import stopping

TOTAL_SECONDS = 570
GRACE_SECONDS = 4  # between SIGTERM and SIGKILL
TABLE_SECONDS = 6  # for the work after the last part
LOADING_SECONDS = 15  # of a part's limit: for imports and for the end of a program
LEAST_SECONDS = 20  # a part is started only with this much time left
FEWER_CORES = 3  # a rehearsal has this many times the limit for a part
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
    """Programs that run at the same time.  limit: in seconds; None: all the time that is left."""

    limit: int | None
    programs: list[Program]


def parts(images: Path, tars: Sequence[Path], results: Path, work: Path, rehearse: bool) -> list[Part]:
    """All parts, in order.

    CIFAR-10 is sharded and its network compiled during the checks, at the lowest priority: nothing is timed there, and
    most of sixteen cores are idle.
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
                *sizes(
                    ["--seconds", "{seconds}", "--num-images", "3000", "--naive-images", "64", "--crop-images", "256"],
                    [*REHEARSAL_SIZE, "--num-images", "3", "--naive-images", "2", "--crop-images", "2"],
                ),
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
    flags.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: to find mistakes, not figures")
    flags.add_argument("--only", nargs="+", metavar="NAME", help="only these; the last has the rest of the time")
    flags.add_argument("--seconds", type=int, default=TOTAL_SECONDS, help=f"time limit (default {TOTAL_SECONDS})")
    flags.add_argument("--spent", type=int, default=0, help="seconds of it spent before this program started")
    flags.add_argument("--results", type=Path, required=True, help="a folder")
    args = flags.parse_args()
    end = time.monotonic() + args.seconds - args.spent
    args.results.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="vgg-lease-"))
    chosen = parts(args.images, args.tars, args.results, work, args.rehearse)
    known = {program.name for part in chosen for program in part.programs}
    if unknown := set(args.only or ()) - known:
        flags.error(f"no such program: {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
    if args.only:
        wanted = {*args.only, "machine"}
        chosen = [Part(p.limit, [program for program in p.programs if program.name in wanted]) for p in chosen]
        chosen = [part for part in chosen if part.programs]
    chosen[-1] = Part(None, chosen[-1].programs)
    lease = Lease(args.results, work, args.rehearse, end)
    stopping.on_stop_signal(stopping.raise_stop_requested)
    try:
        lease.run(chosen)
    except KeyboardInterrupt:
        print("== stopped by a signal", file=sys.stderr)
    finally:
        lease.write()
        print(lease.table())
        shutil.rmtree(work, ignore_errors=True)
    failed = [name for part in chosen for name in (p.name for p in part.programs) if not lease.ended_well(name)]
    rehearsal = "rehearsal, CPU: " if args.rehearse else ""
    print(f"\n{rehearsal}{'without a result: ' + ', '.join(failed) if failed else 'every program gave its result'}")
    sys.exit(1 if failed else 0)


class Lease:
    """Runs the parts and writes their results.  end: by the clock of time.monotonic."""

    def __init__(self, directory: Path, work: Path, rehearse: bool, end: float) -> None:
        self.directory, self.work, self.rehearse, self.end = directory, work, rehearse, end
        self.results: dict[str, dict[str, Any]] = {}
        self.log = open(directory / "log.txt", "w", encoding="utf-8")  # noqa: SIM115  (open until this process ends)
        self.environment = {
            **os.environ,
            # one cache for all programs, so that each graph is compiled once; `repeated` uses its own, empty ones
            "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"),
            **({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}),
        }

    def run(self, chosen: list[Part]) -> None:
        for part in chosen:
            limit = self.seconds_for(part)
            names = ", ".join(program.name for program in part.programs)
            if limit < LEAST_SECONDS:
                print(f"== {names}: not started, {limit:.0f} s left", file=sys.stderr)
                continue
            print(f"== {names}: {limit:.0f} s", file=sys.stderr, flush=True)
            self.run_part(part, limit)
            if not self.rehearse and not self.results.get("machine", {}).get("figures", {}).get("gpu"):
                print("== no GPU on this machine; try everything on a CPU with --rehearse", file=sys.stderr)
                return

    def seconds_for(self, part: Part) -> float:
        left = self.end - time.monotonic() - GRACE_SECONDS - TABLE_SECONDS
        return left if part.limit is None else min(left, part.limit * (FEWER_CORES if self.rehearse else 1))

    def run_part(self, part: Part, limit: float) -> None:
        """Start all programs, read their output, and end those that still run at the limit."""
        start = time.monotonic()
        running: list[Running] = []
        try:
            for program in part.programs:
                seconds = max(1, int(limit) - LOADING_SECONDS)
                running.append(Running(program, seconds, self.work, self.environment))
                self.results[program.name] = {"exit": None, "limit": round(limit), "figures": {}}
            over = False
            while True:
                ended = [self.read_output(one, start) for one in running]
                if all(ended):
                    break
                if not over and time.monotonic() > start + limit:
                    over = True
                    for one in running:
                        self.results[one.name]["over"] = one.process.poll() is None
                        one.kill(signal.SIGTERM)
                elif over and time.monotonic() > start + limit + GRACE_SECONDS:
                    break
                time.sleep(LOOK_SECONDS)
        finally:
            for one in running:
                one.kill(signal.SIGKILL)  # also its children
                one.process.wait()
                self.read_output(one, start)
        self.write()
        for one in running:
            seconds, code = self.results[one.name]["seconds"], self.results[one.name]["exit"]
            print(f"== {one.name}: exit {code} after {seconds} s", file=sys.stderr, flush=True)
            if code:
                print(*one.last[-15:], sep="\n", file=sys.stderr, flush=True)

    def read_output(self, one: Running, start: float) -> bool:
        """Record what a program has printed since the last call; returns whether it has ended."""
        result, code = self.results[one.name], one.process.poll()
        new = False
        for line in one.lines():
            with contextlib.suppress(ValueError):
                figures = json.loads(line)
                if isinstance(figures, dict):
                    result["figures"].update(figures)
                    new = True
        for line in one.messages():
            self.log.write(f"{time.strftime('%H:%M:%S')} {one.name}: {line}\n")
            self.log.flush()
        if code is not None and result["exit"] is None:
            result.update(exit=code, seconds=round(time.monotonic() - start, 1), last=one.last[-1:])
            new = True
        if new:
            self.write()
        return code is not None

    def ended_well(self, name: str) -> bool:
        return self.results.get(name, {}).get("exit") == 0

    def table(self) -> str:
        return table.of(self.results, self.rehearse)

    def write(self) -> None:
        document = {"rehearsal": self.rehearse, "programs": self.results}
        for name, text in (("results.json", json.dumps(document, indent=1)), ("table.md", self.table())):
            temporary = self.directory / f"{name}.new"
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(self.directory / name)


@dataclass
class Running:
    """A program in its own process group, with its output in files: children that outlive it would keep a pipe open."""

    program: Program
    seconds: int
    work: Path
    environment: dict[str, str]
    last: list[str] = field(default_factory=list)  # lines of its messages

    def __post_init__(self) -> None:
        self.name = self.program.name
        paths = [self.work / f"{self.name}.{kind}" for kind in ("out", "err")]
        command = [word.replace("{seconds}", str(self.seconds)) for word in self.program.command]
        with open(paths[0], "w", encoding="utf-8") as out, open(paths[1], "w", encoding="utf-8") as err:
            self.process = subprocess.Popen(
                ["nice", "-n", str(self.program.nice), sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=self.environment, start_new_session=True,
            )  # fmt: skip
        self._out, self._err = (Lines(open(path, errors="replace", encoding="utf-8")) for path in paths)  # noqa: SIM115

    def lines(self) -> list[str]:
        """New lines of its standard output."""
        return self._out.new(self.process.returncode is not None)

    def messages(self) -> list[str]:
        """New lines of its standard error."""
        lines = self._err.new(self.process.returncode is not None)
        self.last = [*self.last, *(line for line in lines if line.strip())][-100:]
        return lines

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Lines:
    """A file that another process writes, line by line."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._partial = file, ""

    def new(self, ended: bool) -> list[str]:
        """New lines.  ended: return the last one even without its newline."""
        *lines, self._partial = (self._partial + self._file.read()).split("\n")
        if ended and self._partial:
            lines, self._partial = [*lines, self._partial], ""
        return lines


if __name__ == "__main__":
    main()
