"""Weights of torchvision, timm, Keras and the Oxford release as a checkpoint, and checkpoints as files for others.

  python -m components.weights import vgg16-397923af.pth --as models/torchvision-vgg16
  python -m components.weights export models/vgg vgg.pth        also .safetensors, .onnx

import recognises the file by its content and runs nothing in it.  evaluate, register, classify and train take the
folder like one that was trained here.  Networks with 1000 outputs have the classes of ILSVRC-2012 in the order of
their WNIDs; for others, --shards or --classes says which.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from components import program

FORMS = ("pth", "safetensors", "onnx")


class Command(program.Parser):
    """The arguments of import or export."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog.removeprefix("python -m "), None)


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.weights", __doc__)
    commands = flags.add_subparsers(dest="command", required=True, metavar="import | export", parser_class=Command)
    reading = commands.add_parser("import")
    reading.add_argument("file", metavar="FILE", help=".pth, .safetensors, .h5, .caffemodel, or a checkpoint folder")
    reading.add_argument("--as", dest="checkpoint", required=True, metavar="DIR", help="out: the checkpoint")
    reading.add_argument("--shards", metavar="DIR", help="in: shards whose classes the outputs must be")
    reading.add_argument("--classes", metavar="FILE", help="in: for every output a line, its WNID and name")
    reading.add_argument(
        "--pixels", choices=("torchvision", "caffe"),
        help="what a file of unknown origin was made for: RGB in 0-1, normalised (assumed), or BGR minus Caffe's mean",
    )  # fmt: skip
    reading.add_argument(
        "--new-classifier", action="store_true",
        help="keep the convolutions, draw a classifier for the classes given: initial weights for a training",
    )  # fmt: skip
    writing = commands.add_parser("export")
    writing.add_argument("checkpoint", metavar="CHECKPOINT", help="in: a finished training, or an import")
    writing.add_argument("file", metavar="FILE", help="out: .pth (torchvision), .safetensors or .onnx")
    writing.add_argument("--kind", choices=FORMS, help="if the name of FILE does not end with it")
    writing.add_argument("--weights", choices=("last", "best"), default="last", help="of a training (last)")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    program.expect_one_process("components.weights")
    import_(args) if args.command == "import" else export(args)


def import_(args: argparse.Namespace) -> None:
    from components.weights import origin
    from runtime.errors import BadData
    from runtime.store import storage
    from runtime.store.place import downloaded, output_at
    from vgg.weights import imported, recognise

    given = imported.read_classes(Path(args.classes)) if args.classes else None
    shards = storage.open_shards(args.shards) if args.shards else None
    path = downloaded(args.file) if storage.is_remote(storage.resolve(args.file)) else Path(args.file)
    source = recognise.read(path)
    if args.pixels:
        source = imported.with_pixels(source, args.pixels)
    if args.new_classifier:
        source = imported.without_classifier(source)
    elif not source.content.has_classifier:
        raise BadData(
            f"{path}: has no valid classifier, only convolutions, so it cannot answer. To use these as initial "
            "weights: --new-classifier with --shards or --classes."
        )
    classes = imported.classes_of(source, given, shards, args.new_classifier)
    output = output_at(storage.resolve(args.checkpoint))
    with output.writing():
        output.download_checkpoints()  # what a store has there, so that it is not replaced
        trained = imported.expect_place(output.directory, imported.describe(source, classes), args.checkpoint)
        if trained is None:
            trained = imported.write(output.directory, source, classes)
        output.upload()
    network, record = trained.manifest["network"], origin.imported(trained.manifest)
    assert record
    program.log.info(
        "%s: %s. VGG, configuration %s%s, %s classes, %s pixels, weights %s",
        args.checkpoint, origin.in_words(record), network["configuration"],
        " with batch norm" if network["batch_norm"] else "", f"{network['num_classes']:,}", network["input_size"],
        trained.weights_sha256,
    )  # fmt: skip
    for note in record["notes"]:
        program.log.info("note: %s", note)


def export(args: argparse.Namespace) -> None:
    from components.weights import export, origin
    from runtime.errors import WrongParameters
    from runtime.store.place import downloaded
    from vgg.network.trained import Trained

    path = Path(args.file)
    form = args.kind or path.suffix.removeprefix(".")
    if form not in FORMS:
        raise WrongParameters(f"{path}: ends with none of .{', .'.join(FORMS)}. Choose one, or give --kind.")
    if path.exists():
        raise WrongParameters(f"{path}: is there already. Name a new file.")
    trained = Trained.open(downloaded(args.checkpoint), args.weights)
    origin.expect_classifier(trained.manifest, args.checkpoint)
    for line in export.write(trained, path, form):
        program.log.info("%s", line)


if __name__ == "__main__":
    program.run(main)
