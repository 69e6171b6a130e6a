"""ILSVRC-2012 and ILSVRC-2010: files, published md5s, numbers of images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Archive:
    """A published file.  md5: as published, None if not known."""

    name: str
    md5: str | None = None


@dataclass(frozen=True, slots=True)
class Images:
    """A split.  num_images: in total.  per_class: the fewest and most images of a class."""

    archive: Archive
    num_images: int
    per_class: tuple[int, int]


@dataclass(frozen=True)
class Edition:
    """The published data of a year.

    name: prefix of the names of val and test images, and of the id in meta.mat.  patches: images that replace those
    with the same name.  test: None if the labels are not published; otherwise test_labels holds them, one per line.
    boxes: bounding boxes, verified and listed if present.  has_cost_matrix: meta.mat holds the cost of confusing two
    classes (hierarchical error).
    """

    name: str
    num_classes: int
    devkit: Archive
    train: Images
    val: Images
    test: Images | None = None
    test_labels: Archive | None = None
    patches: Archive | None = None
    boxes: tuple[Archive, ...] = ()
    has_cost_matrix: bool = False


EDITIONS = {
    "ilsvrc2012": Edition(
        name="ILSVRC2012",
        num_classes=1000,
        devkit=Archive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"),
        train=Images(Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e"), 1_281_167, (732, 1300)),
        val=Images(Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622"), 50_000, (50, 50)),
        boxes=(
            Archive("ILSVRC2012_bbox_train_v2.tar.gz", "9271167e2176350e65cfe4e546f14b17"),
            Archive("ILSVRC2012_bbox_val_v3.tgz", "f4cd18b5ea29fe6bbea62ec9c20d80f0"),
        ),
    ),
    "ilsvrc2010": Edition(
        name="ILSVRC2010",
        num_classes=1000,
        devkit=Archive("ILSVRC2010_devkit-1.0.tar.gz"),
        train=Images(Archive("ILSVRC2010_images_train.tar"), 1_261_406, (668, 3047)),
        val=Images(Archive("ILSVRC2010_images_val.tar"), 50_000, (50, 50)),
        test=Images(Archive("ILSVRC2010_images_test.tar"), 150_000, (150, 150)),
        test_labels=Archive("ILSVRC2010_test_ground_truth.txt"),
        patches=Archive("patch_images.tar"),
        has_cost_matrix=True,
    ),
}
