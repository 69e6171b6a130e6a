"""The localiser in a version: its weights, what it is made of, and what the localise stage has measured with it.

This module imports nothing of vgg.localisation: the register stage's code dependencies are those without a localiser.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.localise.schema import SCHEMA
from runtime import manifest
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet
from vgg.network.trained import Trained

FILES = {"localiser": "localiser.safetensors", "localiser_network": "localiser.json"}
CONVENTION = "x1, y1, x2, y2: pixels of the image as it is stored, both corners inside the box, the first pixel is 0"
AGAIN = "Run the localise stage again."
MAX_DIFFERENCE = 0.1  # median over the boxes, of the image's side: bf16 moves edges, and may merge others


@dataclass(frozen=True)
class Localiser:
    """trained: its network.  content: the manifest of the localisations that were made with it.

    guesses: int64 (n, 5), classes, -1 for none.  boxes: float64 (n, 5, 4), theirs, half-open whole pixels.
    sides: (n,), the longer sides of the images.
    """

    trained: Trained
    content: dict[str, Any]
    localisations_digest: str
    guesses: np.ndarray
    boxes: np.ndarray
    sides: np.ndarray

    @classmethod
    def open(cls, directory: Path, localisations: Path, classifier: Trained, shards: ShardSet) -> Localiser:
        """Raises Refused if files are damaged, or it is not a localiser of this classifier on these shards."""
        trained = Trained.open(directory)
        content = manifest.read(localisations, SCHEMA)
        for entry in content["files"]:
            manifest.verify_file(localisations, entry)
        run, inputs, params = trained.manifest["run"], content["inputs"], content["localise"]
        if "localise" not in run:
            raise Refused(f"{directory}: a classification network, no localiser. Give the localise stage's output.")
        if inputs["weights_sha256"] != trained.weights_sha256:
            raise Refused(f"{localisations}: of another localiser than {directory}. {AGAIN}")
        if inputs["shards"] != shards.digest:
            raise Refused(f"{localisations}: of other shards than {shards.address}. {AGAIN}")
        if content["metrics"]["classifier_sha256"] != classifier.weights_sha256:
            raise Refused(
                f"{directory}: made from other weights than those that are registered. If evaluate.weights is 'best', "
                f"set it to 'last', which localisation takes; else run the localise stage again."
            )
        if params["fuse"]:
            raise Refused(
                f"{localisations}: the boxes of several localisers, and a version holds one. Set localise.fuse to [] "
                "and run the localise stage again."
            )
        guesses = np.load(localisations / "guesses.npy", allow_pickle=False)
        boxes = np.load(localisations / "boxes.npy", allow_pickle=False)[-1]
        rows = shards.split("val").rows
        sides = np.maximum(rows["width"], rows["height"]).astype(np.int64)
        return cls(trained, content, manifest.directory_digest(localisations, content), guesses, boxes, sides)

    @property
    def weights_sha256(self) -> str:
        return self.trained.weights_sha256

    def description(self) -> dict[str, Any]:
        """What the served model is made of besides weights."""
        names = ("regression", "train_scale", "test_scales", "match", "merge_threshold")
        return {
            "network": self.trained.manifest["network"],
            "pixels": self.trained.manifest["pixels"],
            "localise": {name: self.content["localise"][name] for name in names},
            "boxes": CONVENTION,
            "weights_sha256": self.weights_sha256,
        }

    def write(self, directory: Path) -> dict[str, str]:
        """Write its files of the version; returns their paths by name."""
        paths = {name: directory / file for name, file in FILES.items()}
        with manifest.storage_errors(directory):
            shutil.copyfile(self.trained.step.path / "weights.safetensors", paths["localiser"])
        manifest.write_json(paths["localiser_network"], self.description())
        return {name: str(path) for name, path in paths.items()}

    def chain(self) -> dict[str, Any]:
        """As Package.chain()."""
        inputs = {name: self.content["inputs"][name] for name in ("checkpoint", "shards", "boxes")}
        return {
            "digest": self.trained.digest,
            "weights_sha256": self.weights_sha256,
            "localisations": self.localisations_digest,
            "params": self.content["localise"],
            "inputs": inputs,
        }

    def card(self) -> str:
        """Markdown."""
        found, params = self.content["metrics"], self.content["localise"]
        scales = ", ".join(map(str, params["test_scales"]))
        kind = "one box for all classes" if params["regression"] == "single" else "a box for every class"
        chosen = " chosen by other evaluations" if params["classify"] else ""
        return (
            f"## Boxes\n\nEvery class comes with a box: {CONVENTION}. An image is not turned as its EXIF says. The "
            f"boxes are those of the evaluation: {kind} at all positions of the image at the scales {scales} pixels, "
            f"merged ({params['match']}, threshold {params['merge_threshold']:g}); never the central crop alone, also "
            f"of small images, which are scaled up.\n\n"
            f"| on {found['num_images']:,} validation images | error % (IoU below 0.5) |\n|---|---|\n"
            f"| class given | {100 * found['class_given_error']:.2f} |\n"
            f"| five guesses{chosen} | {100 * found['top5_localisation_error']:.2f} |\n\n"
            f"Localiser sha256 `{self.weights_sha256}`, boxes `{self.content['inputs']['boxes']}`. The gate compares "
            f"classification alone.\n\n"
        )

    def compare(self, numbers: np.ndarray, classes: list[list[int]], served: list[list[list[int]]]) -> None:
        """Raises Refused unless a model answers as the localise stage did.

        numbers: of validation images.  classes, served: the classes and the boxes that the model gives for each.
        """
        differences = []
        for number, own, boxes in zip(numbers.tolist(), classes, served, strict=True):
            known = dict(zip(self.guesses[number].tolist(), self.boxes[number], strict=True))
            for label, box in zip(own, boxes, strict=True):
                if label in known:
                    inclusive = known[label] - [0, 0, 1, 1]
                    differences.append(np.abs(np.array(box) - inclusive).max() / self.sides[number])
        if not differences:
            raise Refused("serving check failed: the model names none of the classes that the localise stage did")
        if not (median := float(np.median(differences))) <= MAX_DIFFERENCE:
            raise Refused(
                f"serving check failed: the boxes of the packaged model are not those of the localise stage; they "
                f"differ by {100 * median:.0f} % of the image"
            )
