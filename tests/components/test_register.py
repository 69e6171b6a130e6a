"""Stage 4: the gate, one version per weights, and a model that answers JPEG bytes."""

import base64
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import flags, program
from trainings import run

from components.register.__main__ import main as register
from runtime.errors import Refused, Unreachable
from runtime.shardset import ShardSet
from vgg.evaluation.gate import failures
from vgg.params.register import Gate

GATE = Gate(max_top1_error=0.3, max_top5_error=0.1, max_regression=0.01)


def result(top1_error: float = 0.2, **changes: Any) -> dict[str, Any]:
    return {"top1_error": top1_error, "top5_error": 0.05, "num_images": 50, "data_digest": "a", **changes}


@pytest.mark.parametrize(
    ("challenger", "champion", "said"),
    [
        (result(), None, None),
        (result(0.3), None, None),
        (result(0.31), None, "top1_error 0.3100 is above register.gate.max_top1_error 0.3"),
        (result(float("nan")), None, "top1_error nan"),
        (result(top5_error=0.2), None, "max_top5_error"),
        (result(num_images=49), None, "evaluated on 49 of 50 images"),
        (result(), result(0.195), None),
        (result(), result(0.25), None),
        (result(), result(0.18), "more than register.gate.max_regression 0.01 above the champion's 0.1800"),
        (result(), result(data_digest="b"), "cannot be compared"),
    ],
)
def test_the_gate(challenger: dict, champion: dict | None, said: str | None) -> None:
    reasons = failures(GATE, challenger, 50, champion)
    if said is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        assert said in reasons[0]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::sqlalchemy.exc.SADeprecationWarning")
def test_from_evaluation_to_served_model(
    shards: ShardSet, params_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    params_file.write_text(open_gate)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setattr("components.tracking.GIVE_UP_SECONDS", 0.5)
        with pytest.raises(Unreachable, match=r"MLflow at http://127\.0\.0\.1:9"):
            register(arguments)

    assert "version 1 is champion" in stage("register")
    assert "registered before" in stage("register")
    registered = json.loads((tmp_path / "m/register.json").read_text())
    assert (registered["version"], registered["uri"]) == (1, "models:/tiny@champion")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from model_versions").fetchone() == (1,)

    check_the_model(tmp_path, shards)

    # an evaluation of other weights must not be registered
    evaluation = tmp_path / "m/evaluate.json"
    evaluation.write_text(evaluation.read_text().replace(registered["weights_sha256"], "0" * 64))
    with pytest.raises(Refused, match="other weights"):
        register(arguments)


def check_the_model(tmp_path: Path, shards: ShardSet) -> None:
    """Load the champion as a server does, by its alias, and ask it in a server's JSON."""
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
