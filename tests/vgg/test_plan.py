"""The plan of a training, compared with the paper, with tensors saved by torch, and with a real run."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import EVALUATE, REGISTER, ROOT, SHARD, TRAIN, program, train_params
from torch.nn import functional
from trainings import run

from components.closure import closure
from components.train.__main__ import parser as train_parser
from components.train.plan import main
from runtime.errors import WrongParameters
from runtime.shards.shardset import ShardSet
from vgg.network.init import initialise
from vgg.network.model import CONFIGURATIONS, VGG, Architecture
from vgg.params import load
from vgg.params.train import Plateau, Steps, TrainParams
from vgg.training import plan
from vgg.training.schedule import Schedule

IMAGENET = plan.Data(1_281_167, 1000, "test")
NEEDS_COUNTS = "give --num-images and --num-classes"


def network(
    configuration: str, batch_norm: bool = False, size: int = 224, width: int = 4096, classes: int = 1000
) -> VGG:
    with torch.device("meta"):
        return VGG(Architecture(configuration, batch_norm, width, classes, size))


@pytest.mark.parametrize(
    (
        "configuration",
        "parameters",
        "gmacs",
    ),  # Table 2, exactly; multiply-adds as torchvision publishes them for A to E
    [
        ("A", 132_863_336, 7.609),
        ("A-LRN", 132_863_336, 7.609),
        ("B", 133_047_848, 11.308),
        ("C", 133_638_952, 11.771),
        ("D", 138_357_544, 15.470),
        ("E", 143_667_240, 19.632),
    ],
)
def test_parameters_and_multiply_adds_of_table_2(configuration: str, parameters: int, gmacs: float) -> None:
    net = network(configuration)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert plan.macs(net) / 1e9 == pytest.approx(gmacs, abs=0.0006)


def test_the_plan_of_the_papers_run() -> None:
    params = load(str(ROOT / "recipes/imagenet-d-256.yaml"), "train", TrainParams)
    text = "\n".join(plan.lines(params, IMAGENET, ranks=8, images_per_second=4500))
    for expected in (
        "1,281,167 images, 1,000 classes",
        "256 images a step = 32 a rank × 8; at once 32",
        "5,004.6 an epoch · 74 epochs = 370,338 steps",  # the paper: 370K iterations, 74 epochs
        "divided by 10 after 5 epochs without improvement, at most 3 times",
        "every 2,000 steps (185 in all)",
        "1,106,860,352 bytes each",  # 8 bytes a parameter
        "5.53 GB of disk",
        "138,357,544 parameters; first weights: shallower from --initial",
        "30.94 GFLOP an image forward",
        "92.82 GFLOP in training",
        "8.80 EFLOP in total",
        "weights 553.43 MB · momentum 553.43 MB · gradients 553.43 MB · bf16 copies 276.72 MB",
        "5.9 h at 4,500 images/s",
    ):
        assert expected in text, text
    assert max(map(len, text.splitlines())) <= 120
    # measured with torchvision's vgg16: 42.8 MB per image in bf16, 12.2 MB of it for pooling indices; 73.4 MB in fp32
    assert plan.saved_bytes(network("D"), 2) / 1e6 == pytest.approx(42.8, abs=0.1)
    assert plan.saved_bytes(network("D"), 4) / 1e6 == pytest.approx(73.4, abs=0.3)


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))], ids=lambda p: p.stem
)
@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_every_recipe_has_a_plan(path: Path, ranks: int) -> None:
    params = load(str(path), "train", TrainParams)
    found = plan.lines(params, IMAGENET, ranks)
    assert [line.split()[0] for line in found if not line.startswith(" ")] == [
        "data", "batch", "steps", "schedule", "checkpoints", "network", "FLOPs", "memory", "time",
    ]  # fmt: skip
    assert max(map(len, found)) <= 120


def saved_for_backward(net: VGG, num_images: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass saves for the backward pass; each storage counts once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    size = net.architecture.input_size
    images = torch.randn(num_images, 3, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    keys, labels = torch.arange(num_images), torch.zeros(num_images, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
            scores = net(images, keys)
        loss = functional.cross_entropy(scores.float(), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return sum(storage.nbytes() for storage in storages.values())


@pytest.fixture
def eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration with an eighth of its channels."""
    for name, stages in CONFIGURATIONS.items():
        narrow = [tuple((c[0] // 8, 1) if isinstance(c, tuple) else c // 8 for c in stage) for stage in stages]
        monkeypatch.setitem(CONFIGURATIONS, name, tuple(narrow))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("configuration", list(CONFIGURATIONS))
def test_memory_of_activations_equals_what_torch_saves(
    configuration: str, batch_norm: bool, precision: str, eighth: None
) -> None:
    """Exactly.  The difference between two and four images excludes weights and their copies."""
    net = VGG(Architecture(configuration, batch_norm, 48, 10, 64), 0.5)
    initialise(net, "kaiming", 1)
    net = net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    two, four = (saved_for_backward(net, n, dtype) for n in (2, 4))
    measured, item = (four - two) / 2, 2 if precision == "bf16" else 4
    expected = plan.saved_bytes(net, item) + 8  # the label, which the plan does not count
    if configuration == "A-LRN" and precision == "bf16":
        expected += 2 * (8 + 4) * 64**2  # under autocast LRN's mean of squares is fp32 on a CPU and bf16 on a GPU
    assert measured == expected


def test_memory_of_a_rank() -> None:
    params = train_params(configuration="D", precision="bf16", batch_size=64, micro_batch_size=10)
    net = network("D", size=32, width=16, classes=10)
    alone = plan.memory(params, net, 1)
    weights = 4 * sum(p.numel() for p in net.parameters())
    assert alone["weights"] == alone["momentum"] == alone["gradients"] == 2 * alone["bf16 copies"] == weights
    assert alone["crops"] == 2 * 64 * 3 * 32 * 32
    assert alone["activations"] == 10 * plan.saved_bytes(net, 2)
    shared = plan.memory(train_params(**{**params.model_dump(), "gradient_compression": "bf16"}), net, 20)
    assert shared["activations"] == 4 * plan.saved_bytes(net, 2)  # 64 = 4 × 4 + 16 × 3
    assert (alone["bf16 gradients to send"], shared["bf16 gradients to send"]) == (0, weights // 2)
    plain = plan.memory(train_params(**{**params.model_dump(), "precision": "fp32", "momentum": 0.0}), net, 1)
    assert plain["momentum"] == plain["bf16 copies"] == 0
    assert plain["activations"] == 10 * plan.saved_bytes(net, 4)


def test_the_micro_batch_of_auto_is_that_of_training() -> None:
    auto = {"batch_size": 4096, "micro_batch_size": "auto"}
    assert plan.micro_batch(train_params(**auto, input_size=224, train_scale=256), 2) == 512
    assert plan.micro_batch(train_params(**auto, input_size=224, train_scale=256), 16) == 256
    assert plan.micro_batch(train_params(**auto), 1) == 4096


@pytest.mark.parametrize("num_images", [1_281_167, 1501, 50_000])
@pytest.mark.parametrize("batch_size", [256, 32, 7])
def test_drop_steps_match_the_schedule(num_images: int, batch_size: int) -> None:
    rule = Steps(rule="steps", warmup_epochs=0, drop_factor=10, drop_epochs=[1, 2.5, 3])
    schedule = Schedule(rule, 1.0, num_images / batch_size)
    found = plan.drop_steps(rule, num_images / batch_size)
    assert [schedule.rate(step) / schedule.rate(step - 1) for step in found] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(("patience", "max_drops"), [(5, 3), (1, 0), (2, 1)])
def test_the_earliest_end_matches_the_plateau_rule(patience: int, max_drops: int) -> None:
    rule = {
        "rule": "plateau", "warmup_epochs": 0, "drop_factor": 10, "min_improvement": 0.001, "patience": patience,
        "max_drops": max_drops,
    }  # fmt: skip
    schedule, epochs = Schedule(Plateau.model_validate(rule), 0.01, 10), 0
    while not schedule.finished:
        schedule.validated(0.9)
        epochs += 1
    text = "\n".join(plan.lines(train_params(schedule=rule, epochs=74), IMAGENET))
    assert f"ends after epoch {epochs} " in text
    assert "too few epochs" in "\n".join(plan.lines(train_params(schedule=rule, epochs=epochs), IMAGENET))


def test_steps_and_bytes_of_a_run_match_its_plan(narrow: None, shards: ShardSet, tmp_path: Path) -> None:
    params = train_params(configuration="D", batch_norm=True, checkpoint_steps=3)
    run(shards, tmp_path / "model", configuration="D", batch_norm=True, checkpoint_steps=3)
    data = plan.data("{}", shards.manifest)
    assert (data.num_images, data.num_classes) == (30, 3)
    text = "\n".join(plan.lines(params, data))
    last = sorted((tmp_path / "model").glob("step-*"))[-1]
    assert f"3.8 an epoch · 2 epochs = {int(last.name.removeprefix('step-'))} steps" in text
    size = sum(path.stat().st_size for path in last.iterdir())
    expected = plan.checkpoint_bytes(params, network("D", True, 32, 16, 3))
    assert 0 < size - expected < 40_000


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which the plan must create nothing."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([*map(str, arguments)])
    return capsys.readouterr().out


def test_a_plan_needs_no_data_and_creates_no_files(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imagenet = ROOT / "recipes/imagenet-d-256.yaml"
    assert "1,281,167 images, 1,000 classes (ILSVRC2012)" in output(capsys, "--params", imagenet)
    assert "128 a rank × 2" in output(capsys, "--params", imagenet, "--ranks", 2)
    assert "26.3 h at 1,000 images/s" in output(capsys, "--params", imagenet, "--images-per-second", 1000)
    assert "(as given)" in output(capsys, "--params", imagenet, "--num-images", 1000, "--num-classes", 10)
    found = output(capsys, "--params", imagenet, "--num-images", 256)
    assert "256 images, 1,000 classes (ILSVRC2012 and as given)" in found
    assert "74 epochs = 74 steps" in found
    assert "1,501 images, 10 classes (digits)" in output(capsys, "--params", ROOT / "params.yaml")
    assert list(empty.iterdir()) == []


def test_unknown_counts_are_required(empty: Path, shards: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    path = empty.parent / "params.yaml"
    path.write_text(json.dumps({"shard": SHARD, "train": TRAIN, "evaluate": EVALUATE, "register": REGISTER}))
    for params, unknown in (
        (path, "shard.source 'folder' does not determine"),
        (json.dumps(TRAIN), "'train' alone does not"),
    ):
        for more in ([], ["--num-images", 5]):
            with pytest.raises(WrongParameters, match=f"{unknown}.*{NEEDS_COUNTS}"):
                output(capsys, "--params", params, *more)
        with pytest.raises(WrongParameters, match=f"no finished shards at {empty / 'none'}"):
            output(capsys, "--params", params, "--shards", empty / "none")
        assert "500 images, 3 classes" in output(capsys, "--params", params, "--num-images", 500, "--num-classes", 3)
        assert "30 images, 3 classes (its shards)" in output(capsys, "--params", params, "--shards", shards.directory)
        with pytest.raises(WrongParameters, match="8 is below the number of ranks, 9"):
            output(capsys, "--params", params, "--shards", shards.directory, "--ranks", 9)


def errors(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of the parser before it exits with 64."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    assert caught.value.code == 64
    return capsys.readouterr().err


def test_required_flags(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    required = [action.dest for action in train_parser()._actions if action.required]
    assert required == ["params", "shards", "initial", "checkpoint", "curves", "metrics"]
    assert "required: --params" in errors(capsys)
    for wrong in (["--ranks", "0"], ["--ranks", "many"], ["--num-images", "-3"], ["--images-per-second", "nan"]):
        assert wrong[0] in errors(capsys, "--params", ROOT / "params.yaml", *wrong)
    assert list(empty.iterdir()) == []


def test_the_program_reports_wrong_parameters(empty: Path) -> None:
    done = program("train.plan", "--params", ROOT / "params.yaml", cwd=empty)
    assert (done.returncode, done.stdout.split()[:3]) == (0, ["data", "1,501", "images,"])
    wrong = empty.parent / "wrong.yaml"
    wrong.write_text((ROOT / "params.yaml").read_text().replace("batch_size: 32", "batch_size: 0"))
    done = program("train.plan", "--params", wrong, cwd=empty)
    assert done.returncode == 64
    assert "train.batch_size: must be an integer ≥ 1, ≤ 1,048,576, not 0" in done.stderr
    assert list(empty.iterdir()) == []


def test_training_does_not_depend_on_its_plan() -> None:
    assert "vgg/training/plan.py" not in closure("train")
    assert "vgg/sharding/editions.py" not in closure("train")
