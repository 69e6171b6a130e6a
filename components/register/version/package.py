"""The files of a model version: weights, description of the network, provenance, model card."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from components.evaluate import hits, report
from components.register.version.localiser import Localiser
from components.weights import origin
from runtime import manifest
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet
from vgg.network.trained import Trained
from vgg.params.register import RegisterParams

REQUIREMENTS = (
    "mlflow",
    "torch",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "ruamel.yaml",
    "safetensors",
    "google-crc32c",
)
USAGE = """Use:

```python
import mlflow, pathlib

model = mlflow.pyfunc.load_model("models:/NAME@champion")
model.predict(pathlib.Path("photo.jpg"))  # also bytes, a PIL image, an array, a list of them
model.predict([pathlib.Path("photo.jpg")] * 2, params={"top_k": 3, "embedding": True})
```

```bash
python -m components.classify models:/NAME@champion photo.jpg
mlflow models serve -m models:/NAME@champion --env-manager local --port 8080
echo "{\\"inputs\\": [\\"$(base64 -w0 photo.jpg)\\"], \\"params\\": {\\"top_k\\": 3}}" |
    curl -s http://127.0.0.1:8080/invocations -H 'Content-Type: application/json' -d @-
mlflow models generate-dockerfile -m models:/NAME@champion -d image  # docker build -t NAME image
```
"""
NUM_PROBES = 8  # validation images for which the packaged model must reproduce the evaluation


def open_predictions(directory: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The evaluate stage's predictions and their manifest.  Raises Refused if they are damaged."""
    content = report.read(directory)
    return np.load(directory / "predictions.npy", allow_pickle=False), content


@dataclass(frozen=True)
class Package:
    """Everything that a version is created from, verified to belong together."""

    shards: ShardSet
    trained: Trained
    predictions: np.ndarray
    predictions_digest: str
    evaluation: dict[str, Any]
    evaluate_params: dict[str, Any]
    params: RegisterParams
    localiser: Localiser | None = None

    @classmethod
    def open(
        cls,
        opened: ShardSet,
        checkpoint: Path,
        predictions: Path,
        evaluation: dict[str, Any],
        params: RegisterParams,
        localised: tuple[Path, Path] | None = None,
    ) -> Package:
        """localised: the localise stage's localiser and localisations, if there are.

        Raises Refused if the evaluation is of other weights or other shards, or the localiser is.
        """
        rows, content = open_predictions(predictions)
        if content["evaluate"]["fuse"]:
            raise Refused(
                f"{predictions} is the fusion of several networks, and a version holds one. Set evaluate.fuse to [] "
                "and run the evaluate stage again."
            )
        trained = Trained.open(checkpoint, content["evaluate"]["weights"])
        if evaluation["weights_sha256"] != trained.weights_sha256:
            raise Refused(f"the evaluation is of other weights than {checkpoint}. Run the evaluate stage again.")
        if evaluation["data_digest"] != opened.digest:
            raise Refused(f"the evaluation is of other shards than {opened.address}. Run the evaluate stage again.")
        if {name: evaluation.get(name) for name in content["metrics"]} != content["metrics"]:
            raise Refused(f"the evaluation's metrics differ from those in {predictions}. Run the evaluate stage again.")
        digest = manifest.directory_digest(predictions, content)
        localiser = Localiser.open(*localised, trained, opened) if localised else None
        return cls(opened, trained, rows, digest, evaluation, content["evaluate"], params, localiser)

    def write(self, directory: Path, provenance: dict[str, Any]) -> dict[str, str]:
        """Write the files of the version; returns their paths by name."""
        directory.mkdir(parents=True, exist_ok=True)
        network = description(self.trained, self.evaluate_params, self.shards.manifest["parameters"]["max_pixels"])
        with manifest.storage_errors(directory):  # TMPDIR
            shutil.copyfile(self.trained.step.path / "weights.safetensors", directory / "weights.safetensors")
        manifest.write_json(directory / "network.json", network)
        manifest.write_json(directory / "provenance.json", provenance)
        card = self.card(provenance)
        manifest.write_atomically(directory / "MODEL_CARD.md", lambda file: file.write(card.encode()))
        per_image = hits.write(hits.hits_of(self.predictions, self.shards.digest), hits.keys_sha256(self.shards))
        manifest.write_atomically(directory / hits.FILE, lambda file: file.write(per_image))
        names = {
            "per_image": hits.FILE,
            "weights": "weights.safetensors",
            "network": "network.json",
            "provenance": "provenance.json",
            "card": "MODEL_CARD.md",
        }
        files = {name: str(directory / file) for name, file in names.items()} | self._export(directory)
        return files | (self.localiser.write(directory) if self.localiser else {})

    def _export(self, directory: Path) -> dict[str, str]:
        if not self.params.exports:
            return {}
        from components.register.version.exports import export

        scales = sorted(self.evaluate_params["test_scales"])
        max_pixels = self.shards.manifest["parameters"]["max_pixels"]
        return export(
            self.trained, directory, self.params.exports, self.probes()[0], scales[len(scales) // 2], max_pixels
        )

    def chain(self) -> dict[str, Any]:
        """What the version is made of, from the verified manifests: digest, parameters and inputs of every stage.

        A version therefore says what it was trained on, and how, also where its runs or its shards are gone.
        """
        data = self.shards.manifest
        return {
            **({"localise": self.localiser.chain()} if self.localiser else {}),
            "evaluate": {
                "digest": self.predictions_digest,
                "params": self.evaluate_params,
            },
            "train": {
                "digest": self.trained.digest,
                "weights_sha256": self.trained.weights_sha256,
                **origin.chain(self.trained.manifest),
            },
            "shard": {
                "digest": self.shards.digest,
                "params": data["parameters"],
                "source": data["source"],
                "images_sha256": data["images_sha256"],
            },
        }

    def card(self, provenance: dict[str, Any]) -> str:
        network, result, git = self.trained.manifest["network"], self.evaluation, provenance["code"]["git"]
        record = origin.imported(self.trained.manifest)
        how = f"{origin.in_words(record)}, not trained here, for" if record else "trained on"
        rows = "\n".join(
            f"| {mode} | {100 * r['top1_error']:.2f} | {100 * r['top5_error']:.2f} |"
            for mode, r in result["modes"].items()
        )
        return (
            f"# VGG, configuration {network['configuration']}{' with batch norm' if network['batch_norm'] else ''}\n\n"
            f"{network['num_classes']} classes of {self.shards.manifest['dataset']}, {how} crops of "
            f"{network['input_size']} pixels. Input: the bytes of a JPEG. Headline: {result['headline']}, "
            f"{result['num_images']:,} validation images.\n\n"
            f"| mode | top-1 error % | top-5 error % |\n|---|---|---|\n{rows}\n\n"
            f"Weights sha256 `{self.trained.weights_sha256}`, shards `{self.shards.digest}`, commit `{git['commit']}`"
            f"{' (dirty)' if git['dirty'] else ''}.\n\n{self.localiser.card() if self.localiser else ''}{self._usage()}"
        )

    def _usage(self) -> str:
        """How to use the version, in Markdown; commands are run by tests."""
        name, size = self.params.model_name, self.trained.manifest["network"]["input_size"]
        graphs = {
            "pt2": '`model.pt2` (torch.export: `torch.export.load("model.pt2").module()(safetensors.torch.load_file('
            '"weights.safetensors"), images)`)',
            "onnx": "`model.onnx` (ONNX Runtime; keep `weights.safetensors` beside it)",
        }
        exported = " and ".join(graphs[form] for form in self.params.exports)
        crops = f"uint8 RGB crops (n, {size}, {size}, 3) to probabilities and embedding: {exported}.\n"
        return USAGE.replace("NAME", name) + (f"\nGraphs, {crops}" if exported else "")

    def probe_numbers(self) -> np.ndarray:
        """Of NUM_PROBES validation images."""
        count = len(self.shards.split("val"))
        return np.linspace(0, count - 1, min(NUM_PROBES, count)).astype(int)

    def probes(self) -> tuple[list[bytes], np.ndarray, np.ndarray]:
        """NUM_PROBES validation JPEGs, with the headline mode's best class and its probability for each."""
        split, numbers = self.shards.split("val"), self.probe_numbers()
        headline = self.predictions["modes"][numbers, -1]
        return [split.read(int(n)) for n in numbers], headline["classes"][:, 0], headline["probabilities"][:, 0]


def description(trained: Trained, evaluate: dict[str, Any], max_pixels: int) -> dict[str, Any]:
    """What a Classifier is made of besides weights.  evaluate: the section of parameters of the evaluation."""
    return {
        "network": trained.manifest["network"],
        "pixels": trained.manifest["pixels"],
        "classes": trained.manifest["classes"],
        "evaluate": evaluate,
        "max_pixels": max_pixels,
        "weights_sha256": trained.weights_sha256,
    }


def requirements() -> list[str]:
    """Exact pins of what the packaged model imports."""
    return [f"{name}=={version(name)}" for name in REQUIREMENTS]
