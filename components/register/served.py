"""The packaged model: JPEG bytes in, classes and probabilities out.  MLflow runs this file; nothing is unpickled.

It answers with the headline evaluation: the average over test scales, and over mirror images if that was evaluated.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel
from safetensors.torch import load_file

from vgg.data.images import BadImage, decode
from vgg.evaluation.evaluate import Views
from vgg.network.model import Architecture, blank
from vgg.params.evaluate import EvaluateParams


class JpegClassifier(PythonModel):
    def load_context(self, context: Any) -> None:
        description = json.loads(Path(context.artifacts["network"]).read_bytes())
        self.max_pixels = description["max_pixels"]
        self.wnids = np.array([c["wnid"] for c in description["classes"]])
        self.names = np.array([c["name"] for c in description["classes"]])
        model = blank(Architecture(**description["network"]))
        _verify(context.artifacts["weights"], description["weights_sha256"])
        model.load_state_dict(load_file(context.artifacts["weights"]))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        params = EvaluateParams.model_validate(description["evaluate"])
        self.device, self.views = device, Views(params, model, description["pixels"], device)

    def predict(
        self,
        context: Any,  # noqa: ARG002  # MLflow's signature
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """A row per image, column `image` the bytes of its file.  params: top_k, how many classes to name.

        Raises ValueError, with the number of the row, for bytes that are not an image.
        """
        top_k = min(int((params or {}).get("top_k", 5)), len(self.wnids))
        rows = []
        for number, data in enumerate(model_input["image"]):
            try:
                pixels = np.array(decode(bytes(data), self.max_pixels))
            except BadImage as reason:
                raise ValueError(f"image in row {number}: {reason}") from None
            posterior = self.views.posteriors(torch.from_numpy(pixels)[None].to(self.device))[-1][0].cpu().numpy()
            best = np.argsort(-posterior, kind="stable")[:top_k]
            rows.append(
                {
                    "classes": best.tolist(),
                    "wnids": self.wnids[best].tolist(),
                    "names": self.names[best].tolist(),
                    "probabilities": posterior[best].astype(float).tolist(),
                }
            )
        return pd.DataFrame(rows)


def _verify(path: str, sha256: str) -> None:
    """Raises ValueError unless the file has this sha256 (hex): a damaged network would answer, but wrongly."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: its sha256 is {found}, but network.json says {sha256}: the weights are damaged. Restore the file "
            "in MLflow's artifact store, or register the model again."
        )


mlflow.models.set_model(JpegClassifier())
