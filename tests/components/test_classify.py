"""Classifying files: messages for people, and models that do not exist."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_served import saved  # noqa: F401

from components.classify.__main__ import main
from components.classify.models import answers
from runtime.errors import Refused, Unreachable, WrongParameters


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
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="does not answer"):
        main(["models:/digits@champion", "photo.jpg"])
