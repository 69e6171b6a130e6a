"""Region-of-interest decoding equals Pillow's decode, crop, resize within two grey levels, for all kinds of JPEG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from conftest import photograph
from PIL import Image

from vgg.data import roi
from vgg.data.images import Pixels
from vgg.data.stream import Cut
from vgg.data.windows import Window, centre_window, crop_window

PHOTOGRAPHS = [  # 640 x 427, from scikit-learn
    (Path(sklearn.datasets.__file__).parent / "images" / name).read_bytes() for name in ("china.jpg", "flower.jpg")
]
KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0, "quality": 95},
    "4:2:2": {"subsampling": 1, "quality": 90},
    "4:2:0": {"subsampling": 2, "quality": 75},
    "progressive": {"progressive": True, "quality": 85},
    "optimised": {"optimize": True, "quality": 60, "restart_marker_rows": 1},
}


def reference(data: bytes, window: Window, size: int) -> Pixels:
    """Pillow's decode, crop, resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB").crop(window.box)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def differences(cut: Cut, data: bytes, window: Window, size: int = 224) -> np.ndarray:
    into = np.full((1, size, size, 3), 77, np.uint8)
    assert cut([data], [window], into) == {}
    return np.abs(into[0].astype(int) - reference(data, window, size))


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(params=["nvimgcodec", "pillow", "device cpu", "device cuda"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cut:
    """The CPU decoder, its replacement without nvImageCodec, and DeviceDecoder on a CPU and a GPU."""
    assert roi.nvimgcodec is not None, "nvImageCodec is in the lock file and required for these tests"
    if request.param == "pillow":
        monkeypatch.setattr(roi, "nvimgcodec", None)
    if not request.param.startswith("device"):
        return roi.crops
    device = torch.device(request.param.split()[1])
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: its decoders are not tested")
    on_device = roi.DeviceDecoder(device)

    def crops(images: Sequence[bytes], windows: Sequence[Window], into: Pixels) -> dict[int, str]:
        output = torch.from_numpy(into).to(device)
        bad = on_device.crops(images, windows, output)
        into[:] = output.cpu().numpy()
        return bad

    return crops


@pytest.mark.parametrize("scale", [224, 225, 256, 300, 384, 512])
def test_photographs_at_every_scale_and_corner(cut: Cut, scale: int) -> None:
    found = []
    for data in PHOTOGRAPHS:
        for x, y in ((0.0, 0.0), (0.9999, 0.9999), (0.37, 0.61), (0.0, 0.9999)):
            found.append(differences(cut, data, crop_window(640, 427, scale, 224, x, y)))
    assert np.max(found) <= 2
    assert np.mean(found) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(501, 333), (97, 401), (224, 224), (33, 32), (1203, 799), (8, 300), (1, 1)])
def test_any_size_and_kind(cut: Cut, size: tuple[int, int], kind: str) -> None:
    data = encoded(photograph(size), **KINDS[kind])
    found = []
    for scale in (224, 256, 511):
        for x, y in ((0.0, 0.9999), (0.5, 0.5), (0.83, 0.17)):
            found.append(differences(cut, data, crop_window(*size, scale, 224, x, y)))
    assert np.max(found) <= 2
    assert np.mean(found) < 0.05


OBLONG = [  # shares of an image: left, top, width, height
    (0.0, 0.0, 1.0, 1.0),
    (0.1, 0.3, 0.8, 0.6),
    (0.5, 0.0, 0.3, 0.9),
    (0.7, 0.6, 0.3, 0.4),
    (0.2, 0.2, 0.05, 0.7),
]


@pytest.mark.parametrize("size", [224, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [(501, 333), (97, 401), (1203, 799), (33, 32), (3, 300)])
def test_windows_of_any_ratio_become_squares(cut: Cut, sides: tuple[int, int], kind: str, size: int) -> None:
    """Also shrunk along one side and enlarged along the other."""
    width, height = sides
    data = encoded(photograph(sides), **KINDS[kind])
    found = []
    for left, top, w, h in OBLONG:
        corner = int(left * width), int(top * height)
        window = Window(*corner, max(1, int(w * (width - corner[0]))), max(1, int(h * (height - corner[1]))))
        found.append(differences(cut, data, window, size).ravel())
    together = np.concatenate(found)
    assert together.max() <= 2
    assert together.mean() < 0.2  # some windows have few pixels and steep slopes; rounding occurs twice


def test_grey_images_are_three_equal_channels(cut: Cut) -> None:
    data = encoded(photograph((301, 203)).convert("L"))
    assert differences(cut, data, centre_window(301, 203, 256, 224)).max() <= 2


def test_exif_orientation_is_not_applied(cut: Cut) -> None:
    """The index has width and height as stored; a decoder that rotates the image would cut another window."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photograph((300, 200)), exif=exif)
    assert differences(cut, data, crop_window(300, 200, 256, 224, 0.9, 0.1)).max() <= 2


def test_an_image_smaller_than_its_window_is_refused_not_padded(cut: Cut) -> None:
    data = encoded(photograph((100, 80)))
    into = np.full((1, 224, 224, 3), 77, np.uint8)
    assert cut([data], [Window(10, 1, 80, 80)], into) == {0: "has 100 x 80 pixels, but its crop ends at 90 x 81"}
    assert (into == 77).all()
    for window, end in ((Window(0, 1, 100, 80), "100 x 81"), (Window(61, 0, 40, 80), "101 x 80")):
        assert cut([data], [window], into) == {0: f"has 100 x 80 pixels, but its crop ends at {end}"}
    assert differences(cut, data, Window(0, 0, 100, 80)).max() <= 2


def test_bad_images_are_reported_by_position_and_the_others_decoded(cut: Cut) -> None:
    whole = PHOTOGRAPHS[0]
    images = [whole, b"", whole[: len(whole) // 3], b"no image at all", whole]
    windows = [crop_window(640, 427, 256, 224, 0.5, 0.99)] * 5
    into = np.zeros((5, 224, 224, 3), np.uint8)
    assert sorted(cut(images, windows, into)) == [1, 2, 3]
    for number in (0, 4):
        assert np.abs(into[number].astype(int) - reference(whole, windows[0], 224)).max() <= 2


def test_several_decoder_calls_keep_the_order(cut: Cut) -> None:
    images = [encoded(photograph((60 + i, 50), seed=i)) for i in range(2 * roi.BATCH + 3)]
    windows = [centre_window(60 + i, 50, 40, 32) for i in range(len(images))]
    into = np.zeros((len(images), 32, 32, 3), np.uint8)
    assert cut(images, windows, into) == {}
    for data, window, found in zip(images, windows, into, strict=True):
        assert np.abs(found.astype(int) - reference(data, window, 32)).max() <= 2
