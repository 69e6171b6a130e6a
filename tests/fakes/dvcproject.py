"""A small DVC project: this repository's dvc.yaml with a tiny training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import EVALUATE, REGISTER, ROOT, SHARD, TRAIN, draw_images, environment, make_repository
from ruamel.yaml import YAML


def user(**env: str) -> dict[str, str]:
    """The environment of a user with git and dvc, without configuration of their own."""
    person = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return environment(**person, PATH=path, GIT_CONFIG_GLOBAL="/dev/null", COLUMNS="100", **{"PYTHONPATH": "", **env})


def call(where: Path, *command: str, timeout: float = 300, code: int = 0, **env: str) -> str:
    """What a command prints.  A single word is a line for the shell."""
    done = subprocess.run(
        command[0] if len(command) == 1 else command, shell=len(command) == 1, cwd=where, env=user(**env),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def tiny_project(where: Path, database: Path) -> Path:
    """Everything of the repository that a run needs, with photographs in data/images, and committed without them."""
    where.mkdir(parents=True)
    draw_images(where / "images")
    make_repository(where)
    for name in ("data/images/README.md", "data/initial/README.md"):
        shutil.copy(ROOT / name, where / name)
    shutil.copy(database, where / "mlflow.db")
    yaml = YAML()
    with open(where / "params.yaml", "w") as file:
        yaml.dump(
            {"shard": SHARD, "train": TRAIN, "evaluate": EVALUATE, "register": json.loads(json.dumps(REGISTER))}, file
        )
    call(where, "git init -q && git add -A && git commit -qm begin")
    return where


def readme(heading: str) -> list[list[str]]:
    """The commands of a section of the README, without comments: a list for every block."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = section.split("```\n")[1::2]
    return [[line.split("  #")[0].strip() for line in block.splitlines()] for block in blocks]
