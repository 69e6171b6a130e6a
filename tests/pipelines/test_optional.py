"""Optional stages are in dvc.yaml exactly while params.yaml has their section."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from ruamel.yaml import YAML

from components.closure import closure
from components.localise.__main__ import parser
from pipelines import optional
from runtime.errors import WrongParameters

yaml = YAML(typ="safe", pure=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    shutil.copy(ROOT / "recipes/digit-scenes.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_stage_comes_with_its_section_and_goes_with_it(project: Path) -> None:
    before = (project / "dvc.yaml").read_bytes()
    optional.main([])
    stages = yaml.load(project / "dvc.yaml")["stages"]
    assert list(stages) == ["shard", "train", "evaluate", "localise", "register"]
    others = {name: stage for name, stage in stages.items() if name not in ("localise", "register")}
    plain = yaml.load(before)["stages"]
    assert others == {name: stage for name, stage in plain.items() if name != "register"}
    register = stages["register"]
    assert (
        register["cmd"].replace(" --localiser models/localiser --localisations data/localisations", "")
        == plain["register"]["cmd"]
    )
    assert set(register["deps"]) - set(plain["register"]["deps"]) == {"models/localiser", "data/localisations"}
    once = (project / "dvc.yaml").read_bytes()
    optional.main([])
    assert (project / "dvc.yaml").read_bytes() == once
    plain_params = (ROOT / "params.yaml").read_text()
    for text in (plain_params, plain_params + "\nlocalise: null\n"):
        (project / "params.yaml").write_text(text)
        optional.main([])
        assert (project / "dvc.yaml").read_bytes() == before
        shutil.copy(ROOT / "recipes/digit-scenes.yaml", project / "params.yaml")
        optional.main([])


def test_dvc_knows_the_stage_and_its_parameters(project: Path) -> None:
    optional.main([])

    def dvc(*words: str) -> str:
        command = [sys.executable, "-m", "dvc", *words]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    dvc("init", "--no-scm", "-q")
    assert dvc("stage", "list", "--name-only").split() == ["shard", "train", "evaluate", "localise", "register"]


def test_the_stage_passes_the_programs_flags_and_depends_on_its_science(project: Path) -> None:
    optional.main([])
    stage = yaml.load(project / "dvc.yaml")["stages"]["localise"]
    words = stage["cmd"].split()
    assert words[:3] == ["python", "-m", "components.localise"]
    parsed = vars(parser().parse_args(words[3:]))
    outputs = [next(iter(out)) if isinstance(out, dict) else out for out in (*stage["outs"], *stage["plots"])]
    names = ("boxes", "localiser", "localisations", "curves", "report", "metrics")
    assert sorted(parsed[name] for name in names) == sorted(outputs)
    assert stage["deps"][:3] == [parsed["images"], parsed["shards"], parsed["checkpoint"]]
    assert stage["deps"][3:] == closure("localise")
    assert stage["params"] == ["localise"]


def test_what_was_changed_by_hand_is_left_alone(project: Path) -> None:
    optional.main([])
    changed = (project / "dvc.yaml").read_text().replace("--boxes data/boxes", "--boxes other")
    (project / "dvc.yaml").write_text(changed)
    shutil.copy(ROOT / "params.yaml", project / "params.yaml")
    with pytest.raises(WrongParameters, match="stage 'localise' is not the text of"):
        optional.main([])
    assert (project / "dvc.yaml").read_text() == changed
    changed = (ROOT / "dvc.yaml").read_text().replace("--evaluation metrics/evaluate.json", "--evaluation other.json")
    with pytest.raises(WrongParameters, match=r"'register' does not have these lines once(.|\n)*git checkout dvc.yaml"):
        optional.with_stages(changed, ["localise"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\nevaluate:", "\nevalute:", r"params.yaml:\d+: evalute: unknown section; did you mean 'evaluate'\?"),
        ("  epochs: 10", "  epochs: ten", r"params.yaml:\d+: train.epochs: must be"),
    ],
)
def test_mistakes_are_found_before_dvc_removes_what_a_stage_has_made(
    old: str, new: str, said: str, project: Path
) -> None:
    """make run calls this before dvc repro, which deletes the outputs of a stage whose section is missing."""
    text = (ROOT / "params.yaml").read_text()
    assert old in text
    (project / "params.yaml").write_text(text.replace(old, new))
    with pytest.raises(WrongParameters, match=said):
        optional.main([])


def test_no_other_stage_depends_on_it() -> None:
    for stage in ("shard", "train", "evaluate", "register"):
        assert not [name for name in closure(stage) if "localis" in name]
