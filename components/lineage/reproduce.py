"""Train a model again: the commands that end with the same weights, bit for bit, on the same kind of machine.

    python -m components.lineage reproduce models:/vgg16-digits/3              prints them, as a script for bash
    python -m components.lineage reproduce models:/vgg16-digits/3 --execute    runs them, compares, exit code 0 or 78

They work in a git worktree of their own, at the commit of the training, with the recorded parameters; nothing is taken
from DVC's cache, nothing is tracked in your MLflow.  Other processors, GPUs or numbers of ranks sum in another order.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components import program
from components.lineage import commits, render, walk
from components.lineage.links import DATA, EVALUATION, TRAINING, VERSION, Link
from components.lineage.places import at
from runtime import environment
from runtime.errors import Preempted, Refused
from vgg.params.shard import EMBEDDED

SECTIONS = {"shard": DATA, "train": TRAINING, "evaluate": EVALUATION, "register": VERSION}
UNSET = (  # of the caller: other packages, other runs, the identity of an image
    "PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "DVC_ROOT", "MLFLOW_RUN_ID", "VGG_PIPELINE_RUN", "VGG_GIT_COMMIT",
    "VGG_IMAGE",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.lineage reproduce", __doc__)
    flags.add_argument("reference", help="a version, a run or a checkpoint, as for components.lineage")
    flags.add_argument("--execute", action="store_true", help="run the commands and compare the weights")
    flags.add_argument(
        "--folder",
        metavar="DIR",
        help="for the worktree, kept afterwards; that of an earlier try continues it (default: a temporary one)",
    )
    flags.add_argument("--images", metavar="DIR", help="the source of the shards (default: that of the record)")
    flags.add_argument("--shards", metavar="DIR", help="finished shards, instead of making them from the source")
    flags.add_argument("--initial", metavar="DIR", help="first weights, if it began with some (default: data/initial)")
    flags.add_argument("--python", metavar="FILE", help="of an environment with the packages, instead of make install")
    flags.add_argument("--commit", help="another commit with the same code of training")
    return flags


@dataclass(frozen=True)
class Plan:
    """A training to repeat.  sections: of params.yaml.  remark: about the commit."""

    training: Link
    data: Link
    commit: str
    remark: str
    sections: dict[str, Any]
    commands: dict[str, list[str]]


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    repository = environment.project()
    steps = walk.Walk(repository)
    plan = make(steps.start(args.reference), repository, args)
    for reason in steps.unasked:
        program.log.warning("not asked: %s", reason)
    folder = Path(args.folder).absolute() if args.folder else None
    if folder and folder.exists() and not _continues(folder, plan) and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(
            f"--folder {folder}: is neither empty nor a worktree of commit {plan.commit} with these parameters. "
            "Name a new one."
        )
    if not args.execute:
        print("\n".join(script(plan, repository, folder, args)))
        return
    temporary = folder is None
    folder = folder or Path(tempfile.mkdtemp(prefix="vgg-reproduce-"))
    text = "\n".join(script(plan, repository, folder, args))
    program.log.info("%s\n", text)
    kept = (
        f"{folder} is kept. To continue there: python -m components.lineage reproduce {args.reference} --execute "
        f"--folder {shlex.quote(str(folder))}; to delete it: git worktree remove --force {shlex.quote(str(folder))}"
    )
    if code := execute(text, kept):
        program.end(code if 0 < code < 126 else 70, f"error: a command above failed. {kept}")
    compare(plan, folder, temporary, repository)


def execute(text: str, kept: str) -> int:
    """Run a script in bash; returns its exit code.  If this process is stopped, the commands are too, and end first.

    Raises Preempted with `kept` if it is stopped.
    """
    with subprocess.Popen(["bash", "-c", text], start_new_session=True) as commands:
        try:
            return commands.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(commands.pid, signal.SIGTERM)
            while _alive(commands.pid):  # a training saves its state
                commands.poll()
                time.sleep(0.1)
            raise Preempted(f"interrupted. {kept}") from None


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _continues(folder: Path, plan: Plan) -> bool:
    """Whether the folder is the worktree of an earlier try: with these parameters, so that nothing in it is lost."""
    params = folder / "params.yaml"
    if not (folder / ".git").is_file() or not params.is_file() or params.read_bytes() != parameters(plan).encode():
        return False
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, check=False)
    return head.stdout.strip() == plan.commit.encode()


def make(chain: Link, repository: Path, args: argparse.Namespace) -> Plan:
    """Raises Refused if the records are not enough to train again, or no commit holds the code."""
    training, data = chain.find(TRAINING), chain.find(DATA)
    if training and (record := training.facts.get("origin")):
        raise Refused(f"{args.reference}: {record}, so there is no training to repeat. Import the file again.")
    if training is None or data is None or not training.params or not (data.params or args.shards):
        raise Refused(f"{args.reference}: its records lack the training, its parameters or its data. See the chain.")
    git = training.record.get("code", {}).get("git", {})
    commit, remark = commits.choose(repository, git, training.code, args.commit or "")
    document = _yaml().load(commits.show(repository, commit, "params.yaml"))
    for name, kind in SECTIONS.items():  # the loader wants all; a later stage does not change the weights
        if (link := chain.find(kind)) and link.params:
            document[name] = link.params
    stages = _yaml().load(commits.show(repository, commit, "dvc.yaml"))["stages"]
    commands = {stage: shlex.split(stages[stage]["cmd"]) for stage in ("shard", "train")}
    return Plan(training, data, commit, remark, json.loads(json.dumps(document)), commands)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    return yaml


def script(plan: Plan, repository: Path, folder: Path | None, args: argparse.Namespace) -> Iterator[str]:
    """Lines for bash.  They end with 78 if the shards are others: training on them would be in vain."""
    machine, training = plan.training.record.get("machine") or {}, plan.training
    yield "set -e"
    yield f"# weights {weights(training)}"
    yield f"# trained on {render.shown_machine(machine)}" if machine else "# the machine was not recorded"
    if plan.remark:
        yield f"# commit: {plan.remark}"
    yield f"folder={shlex.quote(str(folder)) if folder else '$(mktemp -d)'}"
    if not (folder and _continues(folder, plan)):
        yield f'git -C {shlex.quote(str(repository))} worktree add --detach "$folder" {plan.commit}'
    yield 'cd "$folder"'
    yield "cat > params.yaml <<'END_OF_PARAMETERS'"
    yield f"{parameters(plan)}END_OF_PARAMETERS"
    yield f"unset {' '.join(UNSET)}"
    yield 'export MLFLOW_TRACKING_URI="sqlite:///$PWD/mlflow.db" VGG_JOURNAL="$PWD/.tracking"'
    if machine.get("threads") and not machine.get("gpu"):
        yield f"export OMP_NUM_THREADS={machine['threads']}"
    python = shlex.quote(str(Path(args.python).absolute())) if args.python else ".venv/bin/python"
    if not args.python:
        yield "make install"
    replaced = {"--initial": _initial(plan, repository, args)}
    if args.shards:
        replaced["--shards"] = str(_expect_shards(plan, args.shards))
    else:
        yield _command(plan.commands["shard"], python, {"--images": _images(plan, repository, args)})
        yield f"grep -q '\"digest\": \"{plan.data.digest}\"' metrics/shard.json || {{ echo 'other shards'; exit 78; }}"
    ranks = machine.get("ranks") or 1
    launcher = ["components.launch", str(ranks)] if ranks > 1 else []
    yield _command(plan.commands["train"], python, replaced, launcher)
    yield f"sha256sum {_checkpoint(plan)}/step-*/weights.safetensors  # one of them must be {weights(training)}"


def parameters(plan: Plan) -> str:
    """The content of params.yaml."""
    text = io.StringIO()
    _yaml().dump(plan.sections, text)
    return text.getvalue()


def _command(words: list[str], python: str, replaced: dict[str, str], launcher: Sequence[str] = ()) -> str:
    """A stage's command of dvc.yaml, with other values of some flags."""
    words = [replaced.get(before) or word for before, word in zip(["", *words], words, strict=False)]
    assert words[:2] == ["python", "-m"]
    return " ".join([python, "-m", *map(shlex.quote, [*launcher, *words[2:]])])


def _images(plan: Plan, repository: Path, args: argparse.Namespace) -> str:
    recorded = plan.data.record.get("inputs", {}).get("images", "data/images")
    images = Path(args.images).absolute() if args.images else repository / recorded
    if not images.is_dir() and plan.data.params.get("source") not in EMBEDDED:
        raise Refused(f"{images}: the source of the shards is not there. Give its folder with --images.")
    return str(images)


def _initial(plan: Plan, repository: Path, args: argparse.Namespace) -> str:
    """The folder of first weights.  Raises Refused if it does not hold those that the training began with."""
    folder = Path(args.initial).absolute() if args.initial else repository / "data/initial"
    first = next((link for link in plan.training.inputs if link.kind == TRAINING), None)
    if first:
        wanted, place = weights(first), at(str(folder))
        if place is None or wanted not in place.weights.values():
            raise Refused(f"{folder}: does not hold the first weights, {wanted}. Give their folder with --initial.")
    return str(folder)


def _expect_shards(plan: Plan, text: str) -> Path:
    place = at(str(Path(text).absolute()))
    if place is None or place.digest != plan.data.digest:
        raise Refused(f"--shards {text}: not the shards of the training, {plan.data.digest}.")
    return Path(text).absolute()


def _checkpoint(plan: Plan) -> str:
    words = plan.commands["train"]
    return words[words.index("--checkpoint") + 1]


def weights(training: Link) -> str:
    """sha256 of the weights that a chain is about."""
    places = [place for place in training.places if place.weights]
    return training.facts.get("weights") or (places[0].weights[places[0].manifest["last"]] if places else "")


def compare(plan: Plan, folder: Path, temporary: bool, repository: Path) -> None:
    """Raises Refused, with both sums, if none of the steps that were kept has the weights."""
    place, wanted = at(str(folder / _checkpoint(plan))), weights(plan.training)
    found = place.weights if place else {}
    if wanted not in found.values():
        sums = "\n".join(f"  {step}: {sha256}" for step, sha256 in sorted(found.items()))
        raise Refused(
            f"not reproduced: the weights are other ones.\n  recorded:      {wanted}\n{sums}\n"
            f"Trained on {render.shown_machine(plan.training.record.get('machine') or {})}.\n"
            f"The folder is kept: {folder}"
        )
    program.log.info("reproduced: weights %s, the same bytes, at commit %s", wanted, plan.commit)
    if temporary:
        with contextlib.suppress(OSError):
            subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=repository, check=False)
