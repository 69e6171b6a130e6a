"""Stage 4: the gate, one version per weights, and a model that answers JPEG bytes."""

import base64
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from conftest import flags, program
from modelserver import serving
from trainings import run

from components.classify.__main__ import main as classifier
from components.register.__main__ import main as register
from components.register.compare import reevaluated, stored_hits
from components.register.registry import open_registry
from runtime.errors import BadData, Refused, Unreachable
from runtime.shards.shardset import ShardSet


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::sqlalchemy.exc.SADeprecationWarning")
@pytest.mark.parametrize("further", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_from_evaluation_to_served_model(
    further: bool,
    shards: ShardSet,
    params_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(shards, tmp_path / "model", epochs=1)
    arguments = [str(word) for word in flags("register", tmp_path, params_file)]
    monkeypatch.chdir(tmp_path)

    def stage(name: str) -> str:
        done = program(name, *flags(name, tmp_path, params_file), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    stage("evaluate")
    open_gate = params_file.read_text()
    params_file.write_text(open_gate.replace('"max_top1_error": 1.0', '"max_top1_error": 0.0'))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(Refused, match=r"gate failed(.|\n)*is above register.gate.max_top1_error 0"):
        register(arguments)
    assert not Path(arguments[-1]).exists()
    verdict = json.loads((tmp_path / "m/gate.json").read_text())
    assert (verdict["registrable"], verdict["champion"]) == (False, None)
    assert "* max_top1_error: register.gate.max_top1_error: " in (tmp_path / "m/gate.md").read_text()

    params_file.write_text(open_gate)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setattr("components.tracking.tracker.FLUSH_SECONDS", 0.5)
        with pytest.raises(Unreachable, match=r"MLflow at http://127\.0\.0\.1:9"):
            register(arguments)

    assert "version 1 is champion" in stage("register")
    caplog.set_level("INFO", "vgg")
    register(arguments)
    assert "version 1 is champion (these weights were registered before)" in caplog.text
    registered = json.loads((tmp_path / "m/register.json").read_text())
    assert (registered["version"], registered["uri"]) == (1, "models:/tiny@champion")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from model_versions where name = 'tiny'").fetchone() == (1,)
        assert database.execute("select alias, version from registered_model_aliases").fetchall() == [("champion", 1)]

    check_the_model(tmp_path, shards)
    if not further:  # damage, classify, files that are gone, other evaluations
        return
    damaged_weights_are_noticed(tmp_path, arguments)
    classify(tmp_path, shards, capsys)
    shutil.rmtree(tmp_path / "mlruns")  # somebody cleaned up: the version is there, its files are not
    register(arguments)
    assert "tiny version 2: has the same weights, but its files are gone" in caplog.text
    assert "version 3 is champion\n" in caplog.text
    check_the_model(tmp_path, shards)
    the_champion_is_evaluated_again(tmp_path, shards)
    params_file.write_text(open_gate.replace('"flip": true,\n  "average"', '"flip": false,\n  "average"'))
    assert params_file.read_text() != open_gate
    stage("evaluate")  # with other parameters: still the same version of these weights
    register(arguments)
    assert caplog.text.count("is champion (these weights were registered before)") == 2

    # an evaluation of other weights must not be registered
    evaluation = tmp_path / "m/evaluate.json"
    evaluation.write_text(evaluation.read_text().replace(registered["weights_sha256"], "0" * 64))
    with pytest.raises(Refused, match="other weights"):
        register(arguments)


def damaged_weights_are_noticed(tmp_path: Path, arguments: list[str]) -> None:
    """Two bytes in the artifact store: the model is not loaded, and another version of the weights is made."""
    import mlflow

    [weights] = (tmp_path / "mlruns").rglob("weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    content[-50] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="the weights are damaged"):
        mlflow.pyfunc.load_model("models:/tiny@champion")
    register(arguments)
    client = mlflow.MlflowClient()
    assert client.get_registered_model("tiny").aliases == {"champion": 2}  # the same weights: no other champion
    assert (
        client.get_model_version("tiny", "1")
        .tags["vgg.damaged"]
        .startswith("artifacts/weights.safetensors: does not have the sha256 of its manifest")
    )
    mlflow.pyfunc.load_model("models:/tiny@champion")


def the_champion_is_evaluated_again(tmp_path: Path, shards: ShardSet) -> None:
    """From the files of its version alone, with its own parameters: the same hits as those of the evaluate stage."""
    rows = np.load(tmp_path / "predictions/predictions.npy", allow_pickle=False)
    with open_registry("tiny") as models:
        champion = models.champion()
        assert champion
        stored, made = stored_hits("tiny", champion), reevaluated(models, champion, shards)
    for found in (stored, made):
        assert found and found.data_digest == shards.digest
        assert np.array_equal(found.top1, rows["modes"]["rank"][:, -1] == 0)
        assert np.array_equal(found.top5, rows["modes"]["rank"][:, -1] < 5)


def classify(tmp_path: Path, shards: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    """A version, with its own code, and the training it comes from.  Images that cannot be used are named."""
    (tmp_path / "val.jpg").write_bytes(shards.split("val").read(0))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    files = ["bad.jpg", "val.jpg", "none.jpg"]
    done = program("classify", "models:/tiny@champion", *files, "--top", 1, "--json", cwd=tmp_path)
    assert done.returncode == 65, done.stderr
    assert "2 images of 3 cannot be used:\n  bad.jpg: not an image of a form" in done.stderr
    bad, good, none = map(json.loads, done.stdout.splitlines())
    assert (bad["file"], none["error"]) == ("bad.jpg", "No such file or directory")
    rows = np.load(tmp_path / "predictions/predictions.npy", allow_pickle=False)
    (best,) = good["predictions"]
    assert best.keys() == {"class", "wnid", "name", "probability"}
    assert best["class"] == rows["modes"]["classes"][0, -1, 0]
    assert best["probability"] == pytest.approx(rows["modes"]["probabilities"][0, -1, 0], abs=1e-4)
    capsys.readouterr()
    with pytest.raises(BadData, match="2 images of 3 cannot be used"):
        classifier(["model", *files, "--top", "2"])
    name, *lines = capsys.readouterr().out.splitlines()
    assert (name, len(lines)) == ("val.jpg", 2)
    shares = [float(line.partition("%")[0]) for line in lines]
    assert 100 / 3 <= shares[0] <= 100 and shares[0] >= shares[1] >= 0
    assert {line.split()[2] for line in lines} < {"cat", "dog", "emu"}


def check_the_model(tmp_path: Path, shards: ShardSet) -> None:
    """Load the champion by its alias, as a server does, and send a request as JSON."""
    import mlflow
    from mlflow.models import validate_serving_input

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/mlflow.db")
    split = shards.split("val")
    rows = np.load(tmp_path / "predictions/predictions.npy", allow_pickle=False)
    request = {
        "dataframe_split": {
            "columns": ["image"],
            "data": [[base64.b64encode(split.read(number)).decode()] for number in range(4)],
        },
        "params": {"top_k": 2},
    }
    served = validate_serving_input("models:/tiny@champion", json.dumps(request))
    assert np.array_equal(np.array(served["classes"].tolist()), rows["modes"]["classes"][:4, -1, :2])
    found = np.array(served["probabilities"].tolist())
    np.testing.assert_allclose(found, rows["modes"]["probabilities"][:4, -1, :2], atol=1e-4)
    assert set(served["wnids"][0]) <= {"cat", "dog", "emu"}
    files = {path.name for path in Path(mlflow.artifacts.download_artifacts("models:/tiny@champion")).rglob("*")}
    assert {"weights.safetensors", "network.json", "provenance.json", "MODEL_CARD.md", "served.py"} <= files
    assert not any(name.endswith((".pkl", ".pth", ".pickle")) for name in files)


@pytest.mark.faults  # installs torch and MLflow
@pytest.mark.timeout(1500)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::sqlalchemy.exc.SADeprecationWarning")
def test_a_server_of_only_the_versions_requirements_answers(
    shards: ShardSet, params_file: Path, tmp_path: Path
) -> None:
    """A real `mlflow models serve` in a fresh environment.  This checkout is not on the path: the version has code."""
    import mlflow

    run(shards, tmp_path / "model", epochs=1)
    for name in ("evaluate", "register"):
        done = program(name, *flags(name, tmp_path, params_file), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/mlflow.db")
    model = Path(mlflow.artifacts.download_artifacts("models:/tiny@champion", dst_path=str(tmp_path / "served")))
    uv, own = Path(sys.executable).with_name("uv"), tmp_path / "own/bin"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "own"], check=True, timeout=60)
    install = [uv, "pip", "install", "--quiet", "--python", own / "python", "-r", model / "requirements.txt"]
    subprocess.run(install, check=True, timeout=1000)
    script = "import sys, mlflow; mlflow.pyfunc.load_model(sys.argv[1]); import vgg, runtime; "
    script += "print(vgg.__file__, runtime.__file__)"
    env = {"PATH": f"{own}:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [own / "python", "-c", script, model], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(model) for file in done.stdout.split()), done.stdout
    text = base64.b64encode(shards.split("val").read(0)).decode()
    with serving(own / "python", model, tmp_path / "serving", env) as address:
        answer = requests.post(address, json={"inputs": [text], "params": {"top_k": 1}}, timeout=60)
        assert answer.status_code == 200, answer.text
        (found,) = answer.json()["predictions"]
        assert requests.post(address, json={"inputs": ["x"]}, timeout=60).status_code == 400
    rows = np.load(tmp_path / "predictions/predictions.npy", allow_pickle=False)
    assert found["classes"] == [rows["modes"]["classes"][0, -1, 0]]
    assert found["probabilities"][0] == pytest.approx(rows["modes"]["probabilities"][0, -1, 0], abs=1e-4)
