"""Kaggle's ILSVRC and Tiny ImageNet: where they keep images, labels and names of classes, and how many there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vgg.sharding.editions import EDITIONS

ENDING = ".JPEG"  # of every image; other files are passed over
Row = Callable[[str], tuple[str, str]]  # the two columns of a line; raises ValueError if it is of another form


@dataclass(frozen=True)
class Layout:
    """A data set as published.

    train: folder with a folder for each class; inner: folder of the images in that.  val: folder of all images;
    val_name: pattern of their names, without the ending.
    labels, classes: tables; read_label, read_class: key and WNID, WNID and words of a line.
    header: first line of labels.  listed: file with the WNIDs of the classes, if the table of classes has others too.
    num_train, num_val: images in total; per_class: the fewest and most of a class.
    """

    title: str
    train: str
    val: str
    val_name: str
    labels: str
    read_label: Row
    classes: str
    read_class: Row
    num_classes: int
    num_train: int
    train_per_class: tuple[int, int]
    num_val: int
    val_per_class: tuple[int, int]
    inner: str = ""
    header: str | None = None
    listed: str | None = None


def kaggle_label(line: str) -> tuple[str, str]:
    """ILSVRC2012_val_00000001,n01440764 85 1 499 272 n01440764 …: WNID and four numbers of every box."""
    key, boxes = line.split(",")
    words = boxes.split()
    if len(words) % 5 or len(set(words[::5])) != 1:
        raise ValueError(line)
    return key, words[0]


def kaggle_class(line: str) -> tuple[str, str]:
    """n01440764 tench, Tinca tinca"""
    wnid, words = line.strip().split(" ", 1)
    return wnid, words


def tiny_label(line: str) -> tuple[str, str]:
    """val_0.JPEG, WNID and the four numbers of a box, with tabs between them."""
    name, wnid, *box = line.strip().split("\t")
    if len(box) != 4 or not name.endswith(ENDING):
        raise ValueError(line)
    return name.removesuffix(ENDING), wnid


def tiny_class(line: str) -> tuple[str, str]:
    """WNID and words, with a tab between them."""
    wnid, words = line.strip().split("\t", 1)
    return wnid, words


ILSVRC = EDITIONS["ilsvrc2012"]
LAYOUTS = {
    "kaggle": Layout(
        title="Kaggle's ILSVRC (imagenet-object-localization-challenge)",
        train="ILSVRC/Data/CLS-LOC/train",
        val="ILSVRC/Data/CLS-LOC/val",
        val_name=r"ILSVRC2012_val_\d{8}",
        labels="LOC_val_solution.csv",
        read_label=kaggle_label,
        classes="LOC_synset_mapping.txt",
        read_class=kaggle_class,
        num_classes=ILSVRC.num_classes,
        num_train=ILSVRC.train.num_images,
        train_per_class=ILSVRC.train.per_class,
        num_val=ILSVRC.val.num_images,
        val_per_class=ILSVRC.val.per_class,
        header="ImageId,PredictionString",
    ),
    "tiny-imagenet": Layout(
        title="Tiny ImageNet (tiny-imagenet-200.zip)",
        train="train",
        val="val/images",
        val_name=r"val_\d+",
        labels="val/val_annotations.txt",
        read_label=tiny_label,
        classes="words.txt",
        read_class=tiny_class,
        num_classes=200,
        num_train=100_000,
        train_per_class=(500, 500),
        num_val=10_000,
        val_per_class=(50, 50),
        inner="images",
        listed="wnids.txt",
    ),
}
