"""Stage 1 of 4: images → verified, byte-reproducible WebDataset shards with an index and a manifest.

Every image is decoded once; unusable images are reported.  After an interruption, finished shards are kept.
Verify a finished data set:  python -m components.shard verify <its manifest.json, local or s3://>
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from components import program

if TYPE_CHECKING:
    from runtime.shards.shardset import ShardSet


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("shard", __doc__)
    flags.add_argument(
        "--images", required=True, metavar="DIR", help="in: the archives, or a folder as shard.source describes it"
    )
    flags.add_argument(
        "--shards", required=True, metavar="DIR", help="out: shards, indexes, manifest.json; may be s3://bucket/prefix"
    )
    flags.add_argument("--metrics", required=True, metavar="FILE", help="out: counts, JSON; written last")
    program.add_executor_input(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["verify"]:
        from components.shard import verify

        verify.main(arguments[1:])
        return
    args = parser().parse_args(arguments)
    program.expect_one_process("components.shard")
    from components.progress import Progress
    from components.stage import Stage
    from runtime import manifest
    from runtime.store import storage
    from runtime.store.place import writing_shards
    from runtime.wording import some
    from vgg.params.shard import ShardParams
    from vgg.sharding.names import text
    from vgg.sharding.open import open_source
    from vgg.sharding.pack import pack

    stage = Stage("shard", args, ShardParams)
    images = storage.locate(args.images)
    stage.inputs["images"] = text(args.images)
    location, code = stage.location(args.shards), manifest.digest_of(stage.code)
    source = open_source(stage.params.source, images, storage.cache_folder)
    links = [split for split in source.splits if (images / split).is_symlink()]
    if links := [str(images / name) for name in (*links, *source.linked_folders)]:
        program.log.warning(
            "%s: DVC does not look into linked folders; after a change there run: dvc repro -f shard", some(links)
        )
    with writing_shards(location) as (target, check), stage.tracked(location) as tracker:
        tracker.name(stage.params.source)
        if stage.params.check_md5:
            with Progress("md5", unit="bytes") as bar:
                source.verify(bar)
        with Progress("shard") as bar:
            pack(stage.params, source, target, code, report=bar, check=check)
        shards = storage.open_shards(location)
        metrics = summary(shards)
        tracker.metrics({f"data/{name}": value for name, value in metrics.items() if isinstance(value, int)}, "child")
        stage.made(tracker, "shards", location, shards.digest)
        tracker.dataset(stage.params.source, location, shards.digest, "shards", metrics)
        tracker.artifact(shards.directory / manifest.NAME, "shards")
        stage.finish(metrics, {"shards": storage.address(location, shards.digest)})
    program.log.info(
        "%s: {num_train:,} training and {num_val:,} validation images of {num_classes:,} classes "
        "in {num_shards:,} shards, digest {digest}".format(**metrics),
        location,
    )


def summary(shards: ShardSet) -> dict[str, int | str]:
    """Digest and counts of the manifest."""
    content = shards.manifest
    return {
        "digest": shards.digest,
        "num_train": content["splits"]["train"]["num_images"],
        "num_val": content["splits"]["val"]["num_images"],
        "num_classes": len(content["classes"]),
        "num_shards": sum(len(split["shards"]) for split in content["splits"].values()),
        "num_amended": len(content["amended"]),
        "num_remarks": len(content["remarks"]),
        "num_quarantined": len(content["quarantined"]),
        "num_duplicates": len(content["duplicates"]),
        "num_bytes": sum(entry["size"] for entry in content["files"]),
    }


if __name__ == "__main__":
    program.run(main)
