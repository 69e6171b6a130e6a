"""Other people's weights: every layout answers as its own software does, and bad files are named and leave nothing."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import weightfiles
from conftest import NARROW, ROOT, program
from safetensors.torch import save_file

from components.weights.__main__ import main
from runtime import manifest
from runtime.errors import BadData, Refused, WrongParameters
from vgg.network.init import for_pixels
from vgg.network.model import CONFIGURATIONS, VGG, Architecture, blank
from vgg.network.trained import Trained
from vgg.weights import content, hdf5, keras, published, recognise
from vgg.weights.wnids import ILSVRC2012

SMALLEST = ((1,), (1,), (2, 1), (1, 1), (1, 1))  # of which keras.h5.gz has random numbers


@pytest.fixture
def smallest(monkeypatch: pytest.MonkeyPatch) -> weightfiles.Net:
    for name in CONFIGURATIONS:
        stages = SMALLEST if name.startswith("A") else [(*stage, 1, 1) for stage in SMALLEST]
        monkeypatch.setitem(CONFIGURATIONS, name, tuple(map(tuple, stages)))
    return weightfiles.net(SMALLEST, side=1, width=2, classes=2)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    (tmp_path / "classes.txt").write_text("n01 a cat\nn02 dog\nn03 emu\n")
    return tmp_path / "classes.txt"


def answers(trained: Trained, images: np.ndarray) -> np.ndarray:
    """Before the softmax, in float64."""
    mean, std = (torch.tensor(trained.manifest["pixels"][part], dtype=torch.float64) for part in ("mean", "std"))
    prepared = ((torch.from_numpy(images).double() - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        return trained.network().double()(prepared).numpy()


def import_(file: Path, *arguments: object) -> Trained:
    folder = file.with_name(f"{file.name}-imported")
    main(["import", str(file), "--as", str(folder), *map(str, arguments)])
    return Trained.open(folder)


LAYOUTS = [
    ("torchvision", "A", False), ("torchvision", "D", True), ("torch", "D", False), ("torch", "A", True),
    ("timm", "A", False), ("timm", "D", True), ("keras", "A", False), ("keras", "D", False), ("caffe", "A", False),
    ("caffe", "D", False), ("caffe-upgraded", "A", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "configuration", "batch_norm"), LAYOUTS)
def test_a_network_answers_as_in_its_own_software(
    kind: str, configuration: str, batch_norm: bool, narrow: None, classes: Path, tmp_path: Path
) -> None:
    net = weightfiles.net(NARROW[configuration], norm=batch_norm)
    images, expected = weightfiles.write(tmp_path / "file", kind, net)
    trained = import_(tmp_path / "file", "--classes", classes)
    found = answers(trained, images)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert np.ptp(expected) > 0.1
    network = {"configuration": configuration, "batch_norm": batch_norm, "classifier_width": 12, "num_classes": 3}
    assert trained.manifest["network"] == {**network, "input_size": 64}
    run = trained.manifest["run"]
    assert run["source"] == "imported"
    assert run["imported"]["kind"] == {"torch": "torchvision", "caffe-upgraded": "caffe"}.get(kind, kind)
    assert run["imported"]["sha256"] == manifest.file_entry(tmp_path, "file")["sha256"]
    assert not run.keys() & {"train", "code", "precision", "initial"}
    assert trained.step.state == {"step": 0}
    assert trained.manifest["classes"][0] == {"wnid": "n01", "name": "a cat"}


@pytest.mark.parametrize(
    ("kind", "module", "name", "mistake"),
    [
        ("caffe", published, "reversed_channels", lambda path, tensors: tensors["features.0.weight"]),
        ("keras", published, "reversed_channels", lambda path, tensors: tensors["features.0.weight"]),
        ("keras", keras, "_fc6", lambda path, matrix, tensors: matrix.T),
    ],
)
def test_the_comparison_notices_what_one_forgets(
    kind: str, module: Any, name: str, mistake: Any, narrow: None, classes: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    images, expected = weightfiles.write(tmp_path / "file", kind, weightfiles.net(NARROW["A"]))
    monkeypatch.setattr(module, name, mistake)
    found = answers(import_(tmp_path / "file", "--classes", classes), images)
    assert np.abs(found - expected).max() > 0.01 * np.abs(expected).max()


def test_reads_what_h5py_has_written(smallest: weightfiles.Net, tmp_path: Path) -> None:
    """keras.h5.gz: written by h5py 3.16 as Keras 2 does; numbers are those of weightfiles.net.

    A group for every layer; create_dataset(name, shape, dtype), then dataset[:] = values; attributes layer_names,
    backend, keras_version of the file, weight_names of the groups; an empty group input_1.
    """
    data = gzip.decompress((ROOT / "tests/vgg/keras.h5.gz").read_bytes())
    expected = weightfiles.keras_arrays(smallest)
    found = {name.lstrip("/"): values for name, values in hdf5.File(memoryview(data)).datasets()}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], values) for name, values in expected.items())
    (tmp_path / "keras.h5").write_bytes(data)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    import_(tmp_path / "keras.h5", "--classes", tmp_path / "classes.txt")


def test_torchvisions_files_are_known_by_their_sha256(narrow: None, tmp_path: Path) -> None:
    vgg16 = published.by_sha256("397923af" + 56 * "0")
    assert vgg16
    assert (vgg16.name, vgg16.classifies) == ("VGG16_Weights.IMAGENET1K_V1", True)
    assert vgg16.pixels == published.IMAGENET
    features = published.by_sha256("88682ab5" + 56 * "0")
    assert features
    assert not features.classifies
    assert features.pixels["mean"] == pytest.approx([123, 117, 104], abs=0.01)
    assert features.pixels["std"] == pytest.approx([1, 1, 1])
    assert published.by_sha256(64 * "0") is None
    weightfiles.write(tmp_path / "vgg16-397923af.pth", "torch", weightfiles.net(NARROW["D"]))
    with pytest.raises(BadData, match="its name says sha256 397923af"):
        recognise.read(tmp_path / "vgg16-397923af.pth")


def test_a_thousand_outputs_are_the_classes_of_ilsvrc2012(narrow: None, tmp_path: Path) -> None:
    weightfiles.write(tmp_path / "file", "caffe", weightfiles.net(NARROW["A"], side=1, classes=1000))
    trained = import_(tmp_path / "file")
    assert len(set(ILSVRC2012)) == 1000
    assert list(ILSVRC2012) == sorted(ILSVRC2012)
    assert manifest.digest_of(ILSVRC2012) == trained.manifest["run"]["data"]["classes_sha256"]
    names = {c["wnid"]: c["name"] for c in trained.manifest["classes"]}
    assert [names[w] for w in ("n01440764", "n02504458", "n15075141")] == ["tench", "African elephant", "toilet tissue"]
    assert trained.manifest["pixels"] == {"mean": [123.68, 116.779, 103.939], "std": [1.0, 1.0, 1.0]}
    assert trained.manifest["run"]["imported"]["ceil_pooling"] is True


def nothing_left(folder: Path, before: set[str]) -> None:
    assert {path.name for path in folder.iterdir()} - {"out.lock"} == before


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def state(net: weightfiles.Net, **changes: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in {**weightfiles.torch_state(net), **changes}.items() if tensor is not None}


NAN = torch.tensor(float("nan"))
BAD: list[tuple[str, str, Callable[[weightfiles.Net, Path], object]]] = [
    ("empty", "is empty", lambda net, path: path.touch()),
    ("other", r"not recognised: begins with 47 49 46", lambda net, path: path.write_bytes(b"GIF89a" * 9)),
    ("Git LFS", "git lfs pull", lambda net, path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1")),
    ("page", "a page of text", lambda net, path: path.write_bytes(b"<!DOCTYPE html><html>404</html>")),
    ("pickle", "a pickle, which could run code", lambda net, path: path.write_bytes(pickle.dumps({"a": 1}))),
    ("ONNX", "ONNX, which is not read", lambda net, path: path.write_bytes(b"\x08\x0a\x12\x07pytorch" + bytes(64))),
    ("NumPy", "a NumPy array", lambda net, path: np.save(path.open("wb"), np.zeros(3))),
    ("zip", "a damaged archive|damaged, or not", lambda net, path: path.write_bytes(b"PK\3\4" + bytes(99))),
    (
        "NaN", r"features.0.bias is not finite",
        lambda net, path: torch.save(state(net, **{"features.0.bias": NAN.expand(8)}), path),
    ),
    (
        "classifier", "no valid classifier.*--new-classifier",
        lambda net, path: torch.save(state(net, **{"classifier.6.bias": NAN.expand(3)}), path),
    ),
    (
        "variance", "a variance is below 0",
        lambda net, path: torch.save(
            state(weightfiles.net(NARROW["A"], norm=True), **{"features.1.running_var": -torch.ones(8)}), path
        ),
    ),
    (
        "shape", r"features.3.weight is \(16, 8, 5, 5\) instead of \(16, 8, 3, 3\)",
        lambda net, path: torch.save(state(net, **{"features.3.weight": torch.zeros(16, 8, 5, 5)}), path),
    ),
    (
        "missing", "features.0.bias is missing",
        lambda net, path: torch.save(state(net, **{"features.0.bias": None}), path),
    ),
    (
        "resnet", "configuration A, conv1.weight is no part of it",
        lambda net, path: torch.save({"conv1.weight": torch.ones(4)}, path),
    ),
    ("int8", "is int8, not floating", lambda net, path: torch.save({"x": torch.ones(4, dtype=torch.int8)}, path)),
    ("huge view", "more than", lambda net, path: torch.save({"x": torch.ones(1).expand(1 << 40)}, path)),
    ("module", "not the tensors of a network", lambda net, path: torch.save({"epoch": 3, "model": {}}, path)),
    (
        "compressed", "compressed",
        lambda net, path: zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED).writestr("a/data.pkl", bytes(1 << 20)),
    ),
    (
        "damaged description", "its description is damaged",
        lambda net, path: save_file(state(net), path, {"vgg": json.dumps({"schema": "vgg.export/1"})}),
    ),
    ("too large", "has 3,221,225,472 bytes", lambda net, path: (path.touch(), os.truncate(path, 3 << 30))),
    (
        "caffe layers", "no layer of the release",
        lambda net, path: path.write_bytes(
            weightfiles.field(2, weightfiles.field(4, b"conv1") + 2 * weightfiles.field(6, weightfiles.caffe_blob(
                np.zeros(4), (4,), True)))
        ),
    ),
    (
        "caffe bomb", "fields",
        lambda net, path: path.write_bytes(weightfiles.field(2, weightfiles.field(4, b"a")) + b"\x08\x01" * 200_000),
    ),
    ("h5 of others", r"it has \(0, 0, 0, 0, 0\)", lambda net, path: path.write_bytes(
        bytes(weightfiles.Hdf5({"conv/kernel": np.ones(3)}).data))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "make"), [entry[1:] for entry in BAD], ids=[entry[0] for entry in BAD])
def test_a_bad_file_is_named_and_leaves_nothing(
    message: str, make: Any, narrow: None, classes: Path, tmp_path: Path
) -> None:
    make(weightfiles.net(NARROW["A"]), tmp_path / "bad.file")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(BadData, match=message) as error:
        main(["import", str(tmp_path / "bad.file"), "--as", str(tmp_path / "out"), "--classes", str(classes)])
    assert "bad.file" in str(error.value)
    nothing_left(tmp_path, before)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    """Of both forms of .pth; the second by the program itself, with its exit code."""
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(BadData, match=r"Python objects besides tensors \(posix.mkdir\)"):
        recognise.read(tmp_path / "a.pth")
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "a.pth")
    done = program("weights", "import", "a.pth", "--as", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (65, ""), done.stderr
    assert done.stderr.startswith("error: a.pth: holds Python objects besides tensors (posix.mkdir)")
    nothing_left(tmp_path, {"a.pth"})


@pytest.mark.parametrize("kind", ["torch", "torchvision", "timm", "keras", "caffe", "caffe-upgraded"])
def test_a_truncated_file_is_refused_wherever_it_ends(kind: str, smallest: weightfiles.Net, tmp_path: Path) -> None:
    """caffe: at every byte; the others, which are longer, at 60 places (HDF5: below, at every byte)."""
    path = tmp_path / "file"
    weightfiles.write(path, kind, smallest)
    assert recognise.read(path).content.has_classifier
    whole = path.read_bytes()
    ends = range(len(whole)) if kind.startswith("caffe") else random.Random(1).sample(range(len(whole)), 60)
    for end in sorted(ends, reverse=True):
        os.truncate(path, end)
        try:
            content = recognise.read(path).content
        except BadData:
            continue
        # between two layers: as if there were no classifier, which import refuses
        assert not content.has_classifier


def test_hdf5_is_refused_wherever_it_ends() -> None:
    whole = memoryview(gzip.decompress((ROOT / "tests/vgg/keras.h5.gz").read_bytes()))
    for end in range(len(whole)):
        with pytest.raises(hdf5.Malformed):
            list(hdf5.File(whole[:end]).datasets())


def test_an_index_of_hdf5_that_contains_itself_ends(smallest: weightfiles.Net) -> None:
    data = weightfiles.Hdf5(weightfiles.keras_arrays(smallest)).data
    root = struct.unpack_from("<Q", data, 64)[0]
    (tree,) = struct.unpack_from("<Q", data, root + 16 + 8)
    node = struct.unpack_from("<Q", data, tree + 32)[0]
    struct.pack_into("<Q", data, node + 8 + 8, root)  # the first member is the group itself
    with pytest.raises(hdf5.Malformed, match="contains itself"):
        list(hdf5.File(memoryview(bytes(data))).datasets())


def test_convolutions_alone_are_initial_weights(narrow: None, classes: Path, tmp_path: Path) -> None:
    """torchvision's file of features has a classifier of NaN."""
    net = weightfiles.net(NARROW["D"])
    nan = {name: NAN.expand(tensor.shape) for name, tensor in state(net).items() if name.startswith("classifier")}
    torch.save(state(net, **nan), tmp_path / "file")
    trained = import_(tmp_path / "file", "--classes", classes, "--new-classifier")
    weights = trained.step.weights()
    assert torch.equal(weights["features.0.weight"], state(net)["features.0.weight"])
    assert weights["classifier.6.weight"].shape == (3, 4096)
    assert weights["classifier.6.weight"].std() == pytest.approx(0.01, rel=0.1)
    with pytest.raises(Refused, match=r"imported from file .* has convolutions only"):
        main(["export", str(trained.directory), str(tmp_path / "a.pth")])


@pytest.mark.parametrize("configuration", ["A", "B", "C", "D", "E"])
@pytest.mark.parametrize("input_size", [32, 64, 224])
def test_the_network_is_found_whatever_the_order_of_its_tensors(
    configuration: str, input_size: int, tmp_path: Path
) -> None:
    """safetensors sorts names: the last convolution is then features.7 of 128 channels, not the last of 512."""
    architecture = Architecture(configuration, False, 64, 10, input_size)
    with torch.device("meta"):
        tensors = VGG(architecture).state_dict()
    for names in (sorted(tensors), sorted(tensors, reverse=True)):
        assert content.architecture_of(tmp_path, {name: tensors[name] for name in names}) == architecture


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {"epoch": 90, "arch": "vgg11", "state_dict": state, "optimizer": {"state": {}}},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 90},
        lambda state: {name.replace("features.", "features.module."): tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["example of PyTorch", "reference of torchvision", "DataParallel of the features", "compiled"],
)
def test_the_checkpoint_of_somebodys_training(wrapped: Any, narrow: None, classes: Path, tmp_path: Path) -> None:
    net = weightfiles.net(NARROW["A"])
    torch.save(wrapped(state(net)), tmp_path / "file")
    images, expected = weightfiles.write(tmp_path / "plain", "torch", net)
    found = answers(import_(tmp_path / "file", "--classes", classes), images)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_a_file_of_unknown_origin_takes_the_users_word(narrow: None, classes: Path, tmp_path: Path) -> None:
    """Oxford's weights with torchvision's names, which circulate as .pth."""
    net = weightfiles.net(NARROW["A"])
    first = torch.from_numpy(net.convolutions[0][0]).flip(1).contiguous()
    torch.save(state(net, **{"features.0.weight": first}), tmp_path / "file")
    images, expected = weightfiles.write(tmp_path / "oxford", "caffe", net)
    found = answers(import_(tmp_path / "file", "--classes", classes, "--pixels", "caffe"), images)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    with pytest.raises(WrongParameters, match="leave --pixels out"):
        import_(tmp_path / "oxford", "--classes", classes, "--pixels", "caffe")


def test_what_a_killed_import_left_is_finished_and_a_training_never_touched(
    narrow: None, classes: Path, tmp_path: Path
) -> None:
    weightfiles.write(tmp_path / "file", "caffe", weightfiles.net(NARROW["A"], side=1))
    first = import_(tmp_path / "file", "--classes", classes)
    (first.directory / manifest.NAME).unlink()
    (first.directory / "step-00000000.tmp").mkdir()
    assert import_(tmp_path / "file", "--classes", classes).digest == first.digest
    # a training that has just begun has a step 0, too
    step = first.directory / "step-00000000"
    of_a_training = {**first.step.metadata, "run": {"train": {}}}
    entries = of_a_training.pop("files")
    for name in ("schema", "sha256"):
        of_a_training.pop(name)
    manifest.write(step, first.step.metadata["schema"], of_a_training, entries)
    (first.directory / manifest.NAME).unlink()
    with pytest.raises(WrongParameters, match="holds something else"):
        import_(tmp_path / "file", "--classes", classes)


def test_who_says_which_classes(narrow: None, classes: Path, tmp_path: Path) -> None:
    weightfiles.write(tmp_path / "file", "caffe", weightfiles.net(NARROW["A"], side=1))
    with pytest.raises(WrongParameters, match="has 3 outputs and does not say which"):
        import_(tmp_path / "file")
    (tmp_path / "two.txt").write_text("a\nb\n")
    with pytest.raises(BadData, match="has 3 outputs, but there are 2 classes"):
        import_(tmp_path / "file", "--classes", tmp_path / "two.txt")
    (tmp_path / "two.txt").write_text("a\na x\n")
    with pytest.raises(BadData, match="twice"):
        import_(tmp_path / "file", "--classes", tmp_path / "two.txt")
    once = import_(tmp_path / "file", "--classes", classes)
    assert import_(tmp_path / "file", "--classes", classes).digest == once.digest  # again: the same, untouched
    (tmp_path / "two.txt").write_text("a\nb\nc\n")
    with pytest.raises(WrongParameters, match="is there already"):
        import_(tmp_path / "file", "--classes", tmp_path / "two.txt")


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_an_export_comes_back_as_it_was(form: str, narrow: None, classes: Path, tmp_path: Path) -> None:
    weightfiles.write(tmp_path / "file", "caffe", weightfiles.net(NARROW["D"]))
    first = import_(tmp_path / "file", "--classes", classes)
    main(["export", str(first.directory), str(tmp_path / f"net.{form}")])
    again = import_(tmp_path / f"net.{form}")
    assert again.weights_sha256 == first.weights_sha256
    same = ("network", "pixels", "classes")
    assert [again.manifest[name] for name in same] == [first.manifest[name] for name in same]
    assert again.manifest["run"]["imported"]["origin"] == first.manifest["run"]
    folder = import_(first.directory)
    assert folder.weights_sha256 == first.weights_sha256
    with pytest.raises(WrongParameters, match="is there already"):
        main(["export", str(first.directory), str(tmp_path / f"net.{form}")])


@pytest.mark.faults  # torch.onnx takes seconds to load; the graphs of registration are tested in the quick suite
def test_onnx_answers_as_the_network(narrow: None, classes: Path, tmp_path: Path) -> None:
    import onnxruntime

    images, expected = weightfiles.write(tmp_path / "file", "torch", weightfiles.net(NARROW["A"], norm=True))
    folder = import_(tmp_path / "file", "--classes", classes).directory
    main(["export", str(folder), str(tmp_path / "net.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    [probabilities] = session.run(["probabilities"], {"images": images})
    posteriors = np.exp(expected - expected.max(1, keepdims=True))
    assert np.abs(probabilities - posteriors / posteriors.sum(1, keepdims=True)).max() < 1e-5


def test_initial_weights_fit_the_pixels_of_the_training(narrow: None) -> None:
    torch.manual_seed(1)
    model = blank(Architecture("A", False, 4, 3, 32))
    weights = {name: torch.randn(tensor.shape) * 0.1 for name, tensor in model.state_dict().items()}
    source, target = published.IMAGENET, {"mean": [100.0, 120.0, 140.0], "std": [1.0, 2.0, 50.0]}
    pixels = torch.randint(0, 256, (1, 3, 96, 96)).float()

    def first_maps(weights: dict[str, torch.Tensor], of: dict[str, list[float]]) -> torch.Tensor:
        model.load_state_dict(weights)
        mean, std = (torch.tensor(of[part])[:, None, None] for part in ("mean", "std"))
        return model.features[0]((pixels - mean) / std)

    with torch.no_grad():
        expected, found = first_maps(weights, source), first_maps(for_pixels(weights, source, target), target)
        assert torch.allclose(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5)
        scaled = {**source, "std": [1.0, 1.0, 1.0]}  # the same mean: borders too
        assert torch.allclose(first_maps(for_pixels(weights, source, scaled), scaled), expected, atol=1e-5)
    assert for_pixels(weights, source, dict(source)) is weights


@pytest.mark.faults
def test_torchvisions_own_vgg11_there_and_back(tmp_path: Path) -> None:
    """At full size, random weights: torchvision → checkpoint → .pth → torchvision, the same answers."""
    from torchvision.models import vgg11

    torch.manual_seed(1)
    model = vgg11().eval()
    torch.save(model.state_dict(), tmp_path / "vgg11.pth")
    trained = import_(tmp_path / "vgg11.pth")
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(trained.network()(images), model(images), atol=1e-5)
        main(["export", str(trained.directory), str(tmp_path / "back.pth")])
        back = vgg11()
        back.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True))
        assert torch.equal(back.eval()(images), model(images))


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["torch", "torchvision", "timm", "keras", "caffe", "caffe-upgraded"])
def test_mutated_bytes_are_refused_or_read_but_never_a_bug(
    kind: str, smallest: weightfiles.Net, tmp_path: Path
) -> None:
    path, draws = tmp_path / "file", random.Random(3)
    weightfiles.write(path, kind, smallest)
    whole = path.read_bytes()
    for _ in range(2000):
        mutated = bytearray(whole)
        for _ in range(draws.choice([1, 1, 2, 4])):
            mutated[draws.randrange(len(whole))] = draws.choice([0, 1, 127, 128, 255, draws.randrange(256)])
        path.write_bytes(mutated)
        try:
            recognise.read(path)
        except BadData as error:
            assert str(path) in str(error)
