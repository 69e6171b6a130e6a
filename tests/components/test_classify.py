"""Classifying files: messages for people, and models that do not exist."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment, flags, program
from modelserver import serving
from test_served import saved  # noqa: F401
from trainings import run

from components.classify.__main__ import main
from components.classify.models import answers
from components.register.version.package import USAGE
from runtime.errors import Refused, Unreachable, WrongParameters
from runtime.shards.shardset import ShardSet


@pytest.mark.faults
def test_a_model_that_cannot_be_loaded_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "model", tmp_path / "model")
    (tmp_path / "model/artifacts/weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(Refused, match=r"model: the model cannot be loaded: (.|\n)*register it again"):
        list(answers(str(tmp_path / "model"), [str(saved / "photo.jpg")], 1))


def test_models_that_do_not_exist_are_explained(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client.create_registered_model("digits")
    version = client.create_model_version("digits", str(tmp_path)).version
    client.set_registered_model_alias("digits", "champion", version)
    for model, message in (
        ("models:/cats@champion", "has no model 'cats'; it has digits"),
        ("models:/digits@best", "has no digits@best; it has digits@champion, digits/1"),
        ("models:/digits/7", "has no digits/7; it has digits@champion, digits/1"),
        ("models:/digits", "write models:/NAME@ALIAS or models:/NAME/VERSION"),
    ):
        with pytest.raises(WrongParameters, match=message):
            main([model, "photo.jpg"])
    with pytest.raises(Refused, match=r"missing, so .*nowhere is not finished"):
        main([str(tmp_path / "nowhere"), "photo.jpg"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/lost.db")
    with pytest.raises(Refused, match=r"lost\.db: there is no such database"):
        main(["models:/digits@champion", "photo.jpg"])
    assert not (tmp_path / "lost.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="does not answer"):
        main(["models:/digits@champion", "photo.jpg"])


def test_the_readme_shows_what_the_cards_show() -> None:
    text = (ROOT / "README.md").read_text()
    assert (
        blocks(USAGE.replace("NAME", "vgg16-digits")).items() <= blocks(text.partition("## Using the model")[2]).items()
    )


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_every_command_of_the_card_works(shards: ShardSet, params_file: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "model", epochs=1)
    for name in ("evaluate", "register"):
        done = program(name, *flags(name, tmp_path, params_file), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (tmp_path / "photo.jpg").write_bytes(shards.split("val").read(0))
    bin_folder = Path(sys.executable).parent
    env = environment(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    env["PATH"] = f"{bin_folder}:{env['PATH']}"

    def succeeds(command: list[object]) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    card = blocks(next((tmp_path / "mlruns").rglob("MODEL_CARD.md")).read_text())
    given = "import pathlib, mlflow\nphoto1 = photo2 = pathlib.Path('photo.jpg')\n"
    succeeds([sys.executable, "-P", "-c", given + card["python"]])
    classify, serve, echo, curl, docker = card["bash"].splitlines()
    assert succeeds(["bash", "-c", classify]).startswith("photo.jpg\n")
    succeeds(["bash", "-c", docker])
    assert (tmp_path / "image/Dockerfile").is_file()
    uri = serve.split(" -m ")[1].split()[0]
    assert serve.split() == f"mlflow models serve -m {uri} --env-manager local --port 8080".split()
    with serving(Path(sys.executable), uri, tmp_path / "serving", env) as address:
        asked = f"{echo}\n{curl}".replace("http://127.0.0.1:8080/invocations", address)
        (answer,) = json.loads(succeeds(["bash", "-c", asked]))["predictions"]
    assert len(answer["names"]) == 3


def blocks(markdown: str) -> dict[str, str]:
    """The first block of code in every language."""
    found: dict[str, str] = {}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", markdown, re.DOTALL):
        found.setdefault(language, code)
    return found
