"""A trained network that answers for images of any size and number, as a server needs it.

Memory is bounded by constants, whatever is asked: images are decoded a batch at a time, and one batch is computed at a
time however many threads ask.  So that cores are not fought over, all batches are computed by the same thread: torch
would start a team of threads for every thread that calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from vgg.data.images import BadImage, Pixels, decode, expect_size, open_checked, to_rgb
from vgg.evaluation.evaluate import chunks_by_size
from vgg.evaluation.scaled import short_side
from vgg.evaluation.views import Picture as Scaled
from vgg.evaluation.views import Views
from vgg.network.model import VGG, Architecture, blank
from vgg.params.evaluate import EvaluateParams

T = TypeVar("T")
Picture = bytes | Pixels | Image.Image  # the content of a file; uint8 RGB (h, w, 3) or grey (h, w); an image of Pillow
BATCH_PIXELS = 1_000_000  # computed together at a scale: 256 MB for the widest map of VGG at full size
MAX_SCALED_PIXELS = 4_000_000  # of one image at a scale


class Classifier:
    """Answers as the headline evaluation does: averaged over positions, scales, and mirror images if evaluated so."""

    def __init__(
        self,
        params: EvaluateParams,
        model: VGG,
        pixels: dict[str, list[float]],
        classes: Sequence[dict[str, str]],
        max_pixels: int,
        num_threads: int,
    ) -> None:
        """pixels: see Views.  classes: with wnid and name.  num_threads: at most this many compute (on a CPU)."""
        params = params.model_copy(update={"batch_pixels": min(params.batch_pixels, BATCH_PIXELS)})
        self.views = Views(params, model, pixels, torch.device("cuda" if torch.cuda.is_available() else "cpu"), True)
        self.scales, self.batch_pixels, self.filter = params.test_scales, params.batch_pixels, params.filter
        self.max_pixels = max_pixels
        self.wnids, self.names = np.array([c["wnid"] for c in classes]), np.array([c["name"] for c in classes])
        torch.set_num_threads(min(num_threads, torch.get_num_threads()))
        self._thread = ThreadPoolExecutor(1, "network")

    @classmethod
    def of(cls, description: dict[str, Any], weights: dict[str, torch.Tensor], num_threads: int) -> Classifier:
        """From the description that a model version keeps beside its weights (components.register.version.package)."""
        model = blank(Architecture(**description["network"]))
        model.load_state_dict(weights)
        params = EvaluateParams.model_validate(description["evaluate"])
        return cls(params, model, description["pixels"], description["classes"], description["max_pixels"], num_threads)

    def answers(self, pictures: Sequence[Picture], top_k: int, embedding: bool = False) -> list[dict[str, Any]]:
        """For every picture the top_k best classes: "classes", "wnids", "names", "probabilities", best first.

        embedding: also "embedding", classifier_width numbers, see Views.
        Raises BadPicture for the first picture that cannot be used.
        """
        sizes = np.array([self.size(n, picture, self.scales) for n, picture in enumerate(pictures)]).reshape(-1, 2)
        found: list[dict[str, Any]] = [{} for _ in pictures]
        for numbers in chunks_by_size(sizes, np.arange(len(sizes)), self.scales, self.batch_pixels):
            batch = {int(number): pictures[number] for number in numbers}
            posteriors, embeddings = self.in_thread(self._compute, batch, embedding)
            for row, number in enumerate(batch):
                found[number] = self._answer(posteriors[row], top_k)
                if embedding:
                    found[number]["embedding"] = embeddings[row].astype(float).tolist()
        return found

    def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """What a function returns that computes with a network: in the one thread that does."""
        return self._thread.submit(work, *arguments).result()

    def size(self, number: int, picture: Picture, scales: Sequence[int]) -> tuple[int, int]:
        """Height and width, from the header of a file, before anything is decoded.

        scales: short sides that it is scaled to.  Raises BadPicture for one that cannot be used, or is too long.
        """
        try:
            if isinstance(picture, np.ndarray):
                height, width = picture.shape[:2]
            else:
                opened = open_checked(picture, self.max_pixels) if isinstance(picture, bytes) else picture
                height, width = opened.height, opened.width
            if not height or not width:
                raise BadImage("no pixels")
            expect_size(width, height, self.max_pixels)
            scale = max(scales)
            scaled, limit = short_side(height, width, scale), max(MAX_SCALED_PIXELS, 2 * scale**2)
            if scaled[0] * scaled[1] > limit:
                raise BadImage(
                    f"{width} x {height} is too long and narrow: scaled to a short side of {scale}, as this network "
                    f"wants it, it would have more than {limit:,} pixels; cut it"
                )
        except BadImage as reason:
            raise BadPicture(number, str(reason)) from None
        return height, width

    def _compute(self, batch: dict[int, Picture], embedding: bool) -> tuple[np.ndarray, np.ndarray]:
        """Posteriors and embeddings (none unless wanted) of pictures, by number, in their order."""
        scaled = [
            Scaled.of(torch.from_numpy(self.pixels(number, picture)), self.views.bases, self.filter)
            for number, picture in batch.items()
        ]
        outputs = self.views(scaled, embedding)
        none = np.zeros((len(batch), 0), np.float32)
        embeddings = none if outputs.embeddings is None else outputs.embeddings.cpu().numpy()
        return outputs.posteriors[:, -1].cpu().numpy(), embeddings

    def pixels(self, number: int, picture: Picture) -> Pixels:
        """uint8 RGB (h, w, 3).  Raises BadPicture."""
        try:
            if isinstance(picture, bytes):
                return np.array(decode(picture, self.max_pixels))
            if isinstance(picture, np.ndarray):
                return picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, 2)
            return np.array(to_rgb(picture)[0])
        except BadImage as reason:
            raise BadPicture(number, str(reason)) from None
        except Exception as error:  # an image of Pillow that is loaded only now, or closed
            raise BadPicture(number, f"cannot be decoded: {error}") from None

    def _answer(self, posterior: np.ndarray, top_k: int) -> dict[str, Any]:
        best = np.argsort(-posterior, kind="stable")[:top_k]
        return {
            "classes": best.tolist(),
            "wnids": self.wnids[best].tolist(),
            "names": self.names[best].tolist(),
            "probabilities": posterior[best].astype(float).tolist(),
        }


class BadPicture(BadImage):
    """A picture that cannot be used.  number: of it, from 0; reason: without the number."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"image in row {number}: {reason}")
        self.number, self.reason = number, reason
