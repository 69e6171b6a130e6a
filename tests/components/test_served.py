"""The served model: what predict takes, what it says to everything else, and the same through a real server."""

import base64
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import requests
from conftest import EVALUATE, environment, once, photograph
from modelserver import serving
from PIL import Image
from safetensors.torch import save_file

from components.register.version.model import arguments
from runtime import manifest
from runtime.cores import usable_cores
from vgg.evaluation import classifier
from vgg.evaluation.views import Outputs, Picture
from vgg.network.init import initialise
from vgg.network.model import Architecture, blank

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SIZE = (48, 36)


def save_model(folder: Path) -> None:
    """A version's files, with random weights: <folder>/model as MLflow keeps it, <folder>/photo.jpg."""
    import mlflow

    architecture = Architecture("A", False, 16, 3, 32)
    network = blank(architecture)
    initialise(network, "kaiming", 1)
    save_file(network.state_dict(), folder / "weights.safetensors")
    description = {
        "network": architecture.as_dict(),
        "pixels": {"mean": [120.0, 110.0, 100.0], "std": [60.0, 60.0, 60.0]},
        "classes": [{"wnid": f"n{n}", "name": name} for n, name in enumerate(("cat", "dog", "emu"))],
        "evaluate": EVALUATE,
        "max_pixels": 1_000_000,
        "weights_sha256": manifest.file_entry(folder, "weights.safetensors")["sha256"],
    }
    (folder / "network.json").write_text(json.dumps(description))
    photograph(SIZE).save(folder / "photo.jpg")
    files = {"weights": str(folder / "weights.safetensors"), "network": str(folder / "network.json")}
    with warnings.catch_warnings(action="ignore"):
        mlflow.pyfunc.save_model(folder / "model", **arguments(files, (folder / "photo.jpg").read_bytes()))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "served", save_model)


@pytest.fixture(scope="session")
def model(saved: Path) -> Any:
    import mlflow

    with warnings.catch_warnings(action="ignore"):
        return mlflow.pyfunc.load_model(str(saved / "model"))


def test_predict_takes_every_form_of_an_image(model: Any, saved: Path) -> None:
    data = (saved / "photo.jpg").read_bytes()
    picture, text = Image.open(io.BytesIO(data)), base64.b64encode(data).decode()
    pixels = np.array(picture)
    expected = model.predict(data)
    assert list(expected.columns) == ["classes", "wnids", "names", "probabilities"]
    assert sorted(expected["names"][0]) == ["cat", "dog", "emu"]
    assert sum(expected["probabilities"][0]) == pytest.approx(1)
    for given in (
        [data], saved / "photo.jpg", picture, pixels, text, f"data:image/jpeg;base64,{text}",
        pd.DataFrame({"image": [data]}), pd.DataFrame({"image": [text]}), pd.DataFrame([[text]]),
        np.array([text]), np.array([[text]]), {"image": [text]}, [{"image": text}],
    ):  # fmt: skip
        assert model.predict(given).to_dict() == expected.to_dict()
    mixed = model.predict([picture.resize((40, 40)), data, pixels, saved / "photo.jpg", picture.resize((40, 40))])
    assert len(mixed) == 5
    for row in (1, 2, 3):  # in the order given, also where sizes are computed apart; a batch changes the last bits
        assert mixed["classes"][row] == expected["classes"][0]
        np.testing.assert_allclose(mixed["probabilities"][row], expected["probabilities"][0], atol=1e-5)
    assert mixed["probabilities"][0] == mixed["probabilities"][4] != mixed["probabilities"][1]
    grey = model.predict(np.array(picture.convert("L")))
    assert grey.to_dict() == model.predict(picture.convert("L")).to_dict() != expected.to_dict()
    assert len(model.predict([])) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([b"not an image"], "row 0: not an image"),
        ("photo.jpg", r"row 0: 'photo.jpg' is not base64; for a file, pass pathlib.Path\('photo.jpg'\)"),
        (Path("no/such.jpg"), "row 0: no/such.jpg: No such file"),
        ([Image.new("RGB", (9, 9)), 4.5], "row 1: found float; wanted: the bytes of an image file, base64"),
        (np.zeros((4, 4, 3)), r"row 0: found array float64 \(4, 4, 3\); wanted"),
        (np.zeros((0, 4, 3), np.uint8), "row 0: no pixels"),
        (pd.DataFrame({"a": [b""], "b": [b""]}), "no column 'image', but 'a', 'b'"),
        (Image.new("L", (1001, 1000)), "row 0: 1001 x 1000 is more than 1,000,000 pixels"),
        (Image.new("L", (1, 100_000)), "row 0: 1 x 100000: one side is more than 100 times the other"),
    ],
)
def test_predict_says_what_it_wants(model: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.predict(given)


def test_top_k_and_embedding(model: Any, saved: Path) -> None:
    data = (saved / "photo.jpg").read_bytes()
    assert [len(model.predict(data, params={"top_k": k})["names"][0]) for k in (1, 2, 3, 50)] == [1, 2, 3, 3]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"top_k is {wrong}; it must be 1 or more"):
            model.predict(data, params={"top_k": wrong})
    found = model.predict([data, data], params={"embedding": True})["embedding"]
    assert found[0] == found[1]
    assert len(found[0]) == 16 and min(found[0]) >= 0 < max(found[0])


def test_one_thread_computes_within_the_pixels(saved: Path) -> None:
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from safetensors.torch import load_file

    description = json.loads((saved / "network.json").read_text())
    ours = classifier.Classifier.of(description, load_file(saved / "weights.safetensors"), 1)
    ours.batch_pixels = 64 * 86 * 4  # four pictures at Q = 64
    seen: list[tuple[int, int]] = []
    views = ours.views

    def counted(pictures: list[Picture], embed: bool) -> Outputs:
        seen.append((threading.get_ident(), len(pictures)))
        return views(pictures, embed)

    counting = mock.MagicMock(side_effect=counted)
    counting.bases = views.bases
    ours.views = counting
    pictures = [photograph(SIZE, seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda _: ours.answers(pictures, 1), range(4)))
    assert all(answer == answers[0] for answer in answers)
    assert len({thread for thread, _ in seen}) == 1
    assert sorted(count for _, count in seen) == [2] * 4 + [4] * 4


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_are_those_of_the_container(files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert usable_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))


@pytest.fixture
def address(saved: Path, tmp_path: Path) -> Iterator[str]:
    env = {**environment(), "PYTHONPATH": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with serving(Path(sys.executable), saved / "model", tmp_path, env) as found:
        yield found


def test_a_real_server_answers_requests_and_says_400_to_mistakes(model: Any, saved: Path, address: str) -> None:
    def ask(**body: Any) -> requests.Response:
        return requests.post(address, json=body, timeout=60)

    data = (saved / "photo.jpg").read_bytes()
    text = base64.b64encode(data).decode()
    expected = model.predict(data).to_dict("records")
    split = {"columns": ["image"], "data": [[text]]}
    for body in ({"dataframe_split": split}, {"inputs": [text]}, {"inputs": {"image": [text]}}, {"inputs": text}):
        answer = ask(**body)
        assert answer.status_code == 200, answer.text
        found = answer.json()["predictions"]
        assert [row["names"] for row in found] == [row["names"] for row in expected]
        np.testing.assert_allclose(found[0]["probabilities"], expected[0]["probabilities"], atol=1e-5)
    asked = ask(inputs=[text, text], params={"embedding": True, "top_k": 1}).json()["predictions"]
    assert [(len(row["names"]), len(row["embedding"])) for row in asked] == [(1, 16), (1, 16)]
    bomb = io.BytesIO()
    Image.new("L", (1, 900_000)).save(bomb, "PNG")
    narrow = base64.b64encode(bomb.getvalue()).decode()
    for body, message in (
        ({"inputs": [text], "params": {"top_k": 0}}, "params: top_k is 0; it must be 1 or more"),
        ({"inputs": [text], "params": {"top_k": "many"}}, "Invalid parameters found"),
        ({"inputs": [text, "/etc/passwd"]}, "image in row 1: '/etc/passwd' is not base64"),
        ({"inputs": [text, text[4:]]}, "image in row 1: not an image of a form that is read here"),
        ({"dataframe_split": {"columns": ["image"], "data": [[text], [7]]}}, "image in row 1: found int; wanted"),
        ({"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2]]}}, "no column 'image', but 'a', 'b'"),
        ({"inputs": [narrow]}, "1 x 900000: one side is more than 100 times the other"),
        ({"pictures": [text]}, "exactly one of the input fields"),
    ):
        answer = ask(**body)
        assert (answer.status_code, message in answer.json()["message"]) == (400, True), answer.text
        if "Invalid parameters" not in message:  # MLflow would repeat the whole request
            assert "Failed to predict data" not in answer.text
