"""The packaged model: images in, classes and probabilities out.  MLflow runs this file; nothing is unpickled.

It answers with the headline evaluation: the average over test scales, and over mirror images if that was evaluated.
With a localiser also a box for every class, as the localise stage finds them: dense at its test scales, merged.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc.model import PythonModel
from safetensors.torch import load_file

from runtime.cores import usable_cores
from vgg.data.images import BadImage
from vgg.evaluation.classifier import Classifier
from vgg.evaluation.pictures import pictures

if TYPE_CHECKING:
    from vgg.localisation.locator import Locator


class WrongRequest(MlflowException, ValueError):
    """What the client sent cannot be answered; a server's status is then 400."""

    def __init__(self, message: str) -> None:
        super().__init__(message, BAD_REQUEST)

    @property
    def message(self) -> str:
        return self._message

    @message.setter
    def message(self, text: str) -> None:
        """Only once: MLflow's server would put the whole input, megabytes of base64, before our message."""
        self._message = getattr(self, "_message", text)


class ImageClassifier(PythonModel):
    def load_context(self, context: Any) -> None:
        description = json.loads(Path(context.artifacts["network"]).read_bytes())
        num_threads = max(1, usable_cores() // _num_processes())
        _verify(context.artifacts["weights"], description["weights_sha256"], "network.json")
        weights = load_file(context.artifacts["weights"])
        self.classifier = Classifier.of(description, weights, num_threads)
        self.locator: Locator | None = None
        if "localiser" in context.artifacts:
            from vgg.localisation.locator import Locator

            localiser = json.loads(Path(context.artifacts["localiser_network"]).read_bytes())
            _verify(context.artifacts["localiser"], localiser["weights_sha256"], "localiser.json")
            boxes = load_file(context.artifacts["localiser"])
            self.locator = Locator(self.classifier, description, weights, localiser, boxes)

    def predict(
        self,
        context: Any,  # noqa: ARG002  # MLflow's signature
        model_input: pd.DataFrame,  # or what the docstring lists: MLflow knows no annotation for that, and would warn
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """A row for every image: classes, wnids, names and probabilities, best first; with a localiser also boxes.

        model_input: the bytes of an image file, base64 text of them (the form of requests), a pathlib.Path, an image
        of Pillow, an array uint8 (height, width, 3) or (height, width), a list of any of them, or a DataFrame with
        them in its column `image`.
        params: top_k, how many classes to name (5).  embedding: true adds the column embedding: the outputs of fc7
        after its ReLU (classifier_width numbers; 4,096 in the paper), averaged as the probabilities are, over
        positions, scales and mirror images.  boxes: false leaves out the boxes, which take longer than the classes.

        A box is [x1, y1, x2, y2], pixels of the image as it is stored (not turned as its EXIF says), both corners
        inside the box, the first pixel 0.

        Raises WrongRequest (a ValueError), with the number of the row, for what is not an image.
        """
        given = {name: value for name, value in (params or {}).items() if value is not None}
        wanted = {"top_k": 5, "embedding": False, "boxes": True, **given}
        if wanted["top_k"] < 1:
            raise WrongRequest(f"params: top_k is {wanted['top_k']}; it must be 1 or more")
        if self.locator and wanted["boxes"] and min(wanted["top_k"], len(self.classifier.wnids)) > self.locator.most:
            raise WrongRequest(
                f"params: top_k is {wanted['top_k']}; with boxes it must be {self.locator.most} or less (boxes: false "
                "leaves them out)"
            )
        try:
            images = pictures(model_input)
            rows = self.classifier.answers(images, wanted["top_k"], wanted["embedding"])
            if self.locator and wanted["boxes"]:
                found = self.locator.boxes(images, [row["classes"] for row in rows])
                rows = [{**row, "boxes": boxes} for row, boxes in zip(rows, found, strict=True)]
            return pd.DataFrame(rows)
        except BadImage as reason:
            raise WrongRequest(str(reason)) from None


def _verify(path: str, sha256: str, described: str) -> None:
    """Raises ValueError unless the file has this sha256 (hex): a damaged network would answer, but wrongly.

    described: the file that states it.
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: its sha256 is {found}, but {described} says {sha256}: the weights are damaged. Restore the file "
            "in MLflow's artifact store, or register the model again."
        )


def _num_processes() -> int:
    """The processes of this server, which share the cores: MLflow gives uvicorn --workers, and they see its argv."""
    following = dict(zip(sys.argv, sys.argv[1:], strict=False)).get("--workers", "1")
    return max(1, int(following)) if following.isdecimal() else 1


mlflow.models.set_model(ImageClassifier())
