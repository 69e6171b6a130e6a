"""The networks of Table 1, compatibility with torchvision, the dense form, schedules, counts and dropout."""

import math
import shutil

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from runtime.errors import Refused
from runtime.shards.batches import ROW, as_crops
from vgg import draws
from vgg.data.augment import Prepare
from vgg.evaluation.metrics import Counts, ranks_of_labels
from vgg.network.dense import DenseVGG
from vgg.network.init import initialise, transplant
from vgg.network.model import CONFIGURATIONS, VGG, Architecture, Dropout, blank
from vgg.params.train import Plateau, Steps
from vgg.training.objective import Classification
from vgg.training.schedule import Schedule

PAPER = {  # exact parameters; the paper's Table 2 gives them in millions
    "A": (132_863_336, 133, 11),
    "A-LRN": (132_863_336, 133, 11),
    "B": (133_047_848, 133, 13),
    "C": (133_638_952, 134, 16),
    "D": (138_357_544, 138, 16),
    "E": (143_667_240, 144, 19),
}
TWINS = [
    ("A", False, "vgg11"), ("B", False, "vgg13"), ("D", False, "vgg16"), ("E", False, "vgg19"),
    ("A", True, "vgg11_bn"), ("B", True, "vgg13_bn"), ("D", True, "vgg16_bn"), ("E", True, "vgg19_bn"),
]  # fmt: skip


def architecture(
    configuration: str = "A", batch_norm: bool = False, width: int = 8, classes: int = 5, size: int = 64
) -> Architecture:
    return Architecture(configuration, batch_norm, width, classes, size)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_parameter_counts_are_the_papers(configuration: str) -> None:
    with torch.device("meta"):
        model = VGG(Architecture(configuration, False, 4096, 1000, 224))
    exact, millions, layers = PAPER[configuration]
    count = sum(p.numel() for p in model.parameters())
    assert count == exact
    assert round(count / 1e6) == millions
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == layers


@pytest.mark.parametrize(("configuration", "batch_norm", "name"), TWINS)
def test_state_dicts_match_torchvision(configuration: str, batch_norm: bool, name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=1000)
        ours = VGG(Architecture(configuration, batch_norm, 4096, 1000, 224))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])


@pytest.mark.parametrize(("configuration", "batch_norm"), [("D", False), ("A", True)])
def test_logits_equal_torchvisions(configuration: str, batch_norm: bool) -> None:
    """At 224 pixels, with a narrow classifier for speed; state_dicts are loaded in both directions."""
    torch.manual_seed(0)
    name = {"D": "vgg16", "A": "vgg11"}[configuration] + ("_bn" if batch_norm else "")
    theirs = getattr(torchvision.models, name)(num_classes=10)
    theirs.classifier = nn.Sequential(
        nn.Linear(25088, 32),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(32, 32),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(32, 10),
    )
    ours = VGG(Architecture(configuration, batch_norm, 32, 10, 224))
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        reference = theirs.eval()(images)
        torch.testing.assert_close(ours.eval()(images), reference, atol=1e-5, rtol=1e-5)
        initialise(ours, "kaiming", 3)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(theirs.eval()(images), ours.eval()(images), atol=1e-5, rtol=1e-5)


def test_another_input_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected \(n, 3, 64, 64\), got \(1, 3, 96, 96\)"):
        VGG(architecture())(torch.zeros(1, 3, 96, 96))


@pytest.mark.parametrize("init", ["glorot", "kaiming", "normal"])
def test_inits_have_their_deviations_and_are_reproducible(init: str) -> None:
    models = [blank(architecture("D", width=512)) for _ in range(2)]
    for model in models:
        initialise(model, init, seed=5)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for name, p in models[0].named_parameters():
        if p.ndim == 1:
            assert not p.any(), name
            continue
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(p)
        std = {"glorot": math.sqrt(2 / (fan_in + fan_out)), "kaiming": math.sqrt(2 / fan_in), "normal": 0.01}[init]
        assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_batch_norm_starts_as_identity() -> None:
    model = blank(architecture(batch_norm=True))
    initialise(model, "kaiming", 1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 8
    for norm in norms:
        assert norm.running_var.eq(1).all()
        assert not norm.running_mean.any()
        assert norm.weight.eq(1).all()


@pytest.mark.parametrize("configuration", ["B", "C", "D", "E"])
def test_transplant_from_net_a(configuration: str) -> None:
    shallow, deep = VGG(architecture("A")), VGG(architecture(configuration))
    before = {k: v.clone() for k, v in deep.state_dict().items()}
    copied = transplant(deep, shallow)
    assert len(copied) == 7
    ours, theirs = deep.state_dict(), shallow.state_dict()
    for source, target in zip(("features.0", "features.3", "features.6", "features.8"), copied[3:], strict=True):
        assert torch.equal(ours[f"{target}.weight"], theirs[f"{source}.weight"])
    changed = {k.rsplit(".", 1)[0] for k in ours if not torch.equal(ours[k], before[k])}
    assert changed == set(copied)
    with pytest.raises(Refused, match=r"classifier\.0\.weight is \(9"):
        transplant(deep, VGG(architecture("A", width=9)))


@pytest.mark.parametrize("configuration", ["A-LRN", "C", "D"])
def test_dense_equals_the_classifier_at_the_training_size(configuration: str) -> None:
    torch.manual_seed(1)
    model = VGG(architecture(configuration)).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        found = DenseVGG(model)(images)
        assert found.shape == (3, 5, 1, 1)
        torch.testing.assert_close(found[:, :, 0, 0], model(images), atol=1e-5, rtol=1e-5)


def test_dense_positions_equal_the_classifier_on_windows() -> None:
    """On a larger image every position equals fc6 to fc8 on a window of the last map."""
    torch.manual_seed(2)
    model = blank(architecture("A")).eval()
    initialise(model, "kaiming", 2)
    images = torch.randn(1, 3, 130, 161)
    with torch.no_grad():
        dense = DenseVGG(model)
        found, maps = dense(images), model.features(images)
        assert found.shape == (1, 5, 130 // 32 - 1, 161 // 32 - 1)
        for y in range(found.shape[2]):
            for x in range(found.shape[3]):
                window = maps[:, :, y : y + 2, x : x + 2].flatten(1)
                torch.testing.assert_close(found[:, :, y, x], model.classifier(window), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(DenseVGG(model, dtype=torch.bfloat16)(images), found, atol=0.1, rtol=0.1)
        assert DenseVGG(model, ceil_pooling=True)(images).shape == (1, 5, 4, 5)
        with pytest.raises(ValueError, match="64 or more"):
            dense(torch.zeros(1, 3, 63, 64))


@pytest.mark.parametrize(
    ("configuration", "ceil_pooling"),
    [
        ("A-LRN", False), ("C", True), ("E", True),
        *(pytest.param(*other, marks=pytest.mark.faults) for other in (("A-LRN", True), ("C", False), ("E", False))),
    ],
)  # fmt: skip
def test_strips_give_the_same_numbers(configuration: str, ceil_pooling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, for odd sizes, several images, and strips that end with one row."""
    model = blank(architecture(configuration)).eval()
    initialise(model, "kaiming", 2)
    images = torch.randn(2, 3, 131, 97)
    with torch.no_grad():
        dense = DenseVGG(model, ceil_pooling)
        whole = dense.maps(images)
        for cached in (1, 300_000, 4_000_000):  # rows, rows, images
            monkeypatch.setattr("vgg.network.stages.CACHED_BYTES", cached)
            assert torch.equal(dense.maps(images), whole)


def test_the_plateau_rule_of_the_paper_ends_at_1e_5() -> None:
    rule = Plateau(rule="plateau", warmup_epochs=0, drop_factor=10, patience=2, min_improvement=0.001, max_drops=3)
    schedule, rates = Schedule(rule, 0.01, steps_per_epoch=10), []
    for error in [0.9, 0.5, 0.5, 0.4995, 0.3, 0.31, 0.32, 0.33, 0.34, 0.35, 0.36]:
        rates.append(schedule.rate(0))
        schedule.validated(error)
    assert rates == pytest.approx([0.01] * 4 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 2)
    assert schedule.finished
    resumed = Schedule(rule, 0.01, 10)
    resumed.restore(schedule.state())
    assert (resumed.finished, resumed.state()) == (True, schedule.state())


def test_fixed_steps_and_warm_up() -> None:
    rule = Steps(rule="steps", warmup_epochs=1, drop_factor=10, drop_epochs=[2, 3.5])
    schedule = Schedule(rule, 0.1, steps_per_epoch=4)
    rates = [schedule.rate(step) for step in range(16)]
    assert rates == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 5 + [0.01] * 6 + [0.001] * 2)
    assert not schedule.finished


def test_ranks_of_labels_equal_those_of_a_sorted_list() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200, 12), generator=generator).float()  # many ties
    labels = torch.randint(0, 12, (200,), generator=generator)
    found = ranks_of_labels(scores, labels)
    for row, label, rank in zip(scores.tolist(), labels.tolist(), found.tolist(), strict=True):
        order = sorted(range(12), key=lambda c: (-row[c], c))
        assert order.index(label) == rank
    with pytest.raises(ValueError, match="labels"):
        ranks_of_labels(scores, labels[:, None])


def test_counts_do_not_depend_on_the_number_of_ranks() -> None:
    scores, labels = torch.randn(101, 10), torch.randint(0, 10, (101,))
    errors = Classification.errors

    def counted(part: slice) -> Counts:
        counts = Counts.zeros(torch.device("cpu"))
        crops = as_crops(torch.zeros(0), np.zeros(0, ROW))._replace(labels=labels[part])
        counts.add(*Classification().measure(scores[part], crops))
        return counts

    whole = counted(slice(None))
    total = torch.zeros(4, dtype=torch.float64)
    for rank in range(3):
        total += counted(slice(rank, None, 3)).total
    assert total[:3].tolist() == whole.total[:3].tolist()
    assert Counts(total).values(errors)["num_images"] == 101
    assert Counts(total).values(errors)["top1_error"] == whole.values(errors)["top1_error"]


def splitmix64(x: int) -> int:
    """The published function, on unsigned integers."""
    mask = 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def test_numpy_and_torch_mix_the_same_bits() -> None:
    numbers = draws.bits("numbers", np.arange(1000))
    mixed = draws._mix_tensor(torch.from_numpy(numbers.view(np.int64)))
    assert np.array_equal(mixed.numpy().view(np.uint64), draws._mix(numbers))
    assert int(mixed[5]) % 2**64 == splitmix64(int(numbers[5]))


KEYS = torch.tensor([0, 1, -5, 2**62 + 7, -(2**63)])
COLUMNS = 65


@pytest.fixture
def kept() -> torch.Tensor:
    """Which outputs of a layer dropout keeps: a function of key, layer and column."""
    mask, least, layer = 2**64 - 1, round(0.3 * 2**24), 6 * 2**32
    rows = [
        [splitmix64(key + (layer + n) * 0x9E3779B97F4A7C15 & mask) >> 40 >= least for n in range(1, COLUMNS + 1)]
        for key in KEYS.tolist()
    ]
    assert 0.5 < sum(map(sum, rows)) / KEYS.numel() / COLUMNS < 0.9
    return torch.tensor(rows)


def test_dropout_keeps_the_expected_outputs(kept: torch.Tensor) -> None:
    dropout = Dropout(0.3, 6).train()
    assert torch.equal(dropout(torch.ones(kept.shape), KEYS) > 0, kept)


@pytest.mark.faults  # compiling takes 20 seconds
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_compiled_dropout_keeps_the_same_outputs(kept: torch.Tensor) -> None:
    """As on a GPU; a compiler that does not wrap integers would fail or keep others."""
    dropout = torch.compile(Dropout(0.3, 6).train(), dynamic=False)
    assert torch.equal(dropout(torch.ones(kept.shape), KEYS) > 0, kept)


def test_compiled_modules_define_forward() -> None:
    """torch 2.11 silently does not compile modules whose forward is that of a torch.nn class."""
    model = blank(Architecture("A", False, 16, 3, 32))
    for region in (model.features, model.classifier, Prepare([0.0] * 3, [1.0] * 3)):
        assert type(region).forward.__module__.startswith("vgg."), region
