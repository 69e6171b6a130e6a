"""Stage 1 of 4: images → verified, byte-reproducible WebDataset shards with an index and a manifest.

Every image is decoded once; unusable ones are named.  Killed and run again, finished shards are kept.
A whole data set is checked again by:  python -m components.shard verify <its manifest.json, local or s3://>
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components import program

if TYPE_CHECKING:
    from vgg.index import ShardSet


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("shard", __doc__)
    flags.add_argument(
        "--images", required=True, metavar="DIR", help="in: the archives, or train/<class>/* and val/<class>/*"
    )
    flags.add_argument(
        "--shards", required=True, metavar="DIR", help="out: shards, indexes, manifest.json; may be s3://bucket/prefix"
    )
    flags.add_argument("--metrics", required=True, metavar="FILE", help="out: counts, JSON; written last")
    program.add_executor_input(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["verify"]:
        from components.shard import verify

        verify.main(words[1:])
        return
    args = parser().parse_args(words)
    program.expect_one_process("components.shard")
    from vgg.params import load
    from vgg.params.shard import ShardParams

    params = load(args.params, "shard", ShardParams)
    from components import closure, progress, provenance, storage, tracking
    from components.shard.place import writing
    from vgg import manifest, shards, sources

    code = manifest.digest_of(closure.fingerprints("shard"))
    identity = {"shard": params.model_dump(), "images": args.images, "code": code}
    place = storage.resolve(args.shards, identity)
    images = storage.locate(args.images)
    source = sources.open_source(params.source, images)
    if links := [str(images / split) for split in source.splits if (images / split).is_symlink()]:
        program.log.warning(
            "%s: DVC does not look behind links; after a change run: dvc repro -f shard", ", ".join(links)
        )
    record = provenance.record("shard", params.model_dump(), {})
    with (
        writing(place) as (target, check),
        tracking.Tracker("shard", tracking.key(identity, place), provenance.lineage(args.params)) as tracker,
    ):
        tracker.params({"shard": params.model_dump()})
        tracker.tags(provenance.tags(record))
        if params.check_md5:
            with progress.Progress("md5", unit="bytes") as bar:
                source.verify(bar)
        with progress.Progress("shard") as bar:
            shards.pack(params, source, target, code, report=bar, check=check)
        made = storage.open_shards(place)
        metrics = summary(made)
        tracker.metrics({f"data/{name}": value for name, value in metrics.items() if isinstance(value, int)}, "child")
        tracker.dataset(params.source, place, made.digest, "shards", metrics)
        tracker.artifact(made.directory / manifest.NAME, "shards")
        manifest.write_json(Path(args.metrics), metrics)
    program.write_executor_output(
        args.executor_output,
        {"shards": storage.address(place, made.digest)},
        {"metrics": (args.metrics, program.numbers(metrics))},
    )
    program.log.info(
        "%s: {num_train:,} training and {num_val:,} validation images of {num_classes:,} classes "
        "in {num_shards:,} shards, digest {digest}".format(**metrics),
        place,
    )


def summary(made: ShardSet) -> dict[str, int | str]:
    """The manifest in a few numbers."""
    about = made.manifest
    return {
        "digest": made.digest,
        "num_train": about["splits"]["train"]["num_images"],
        "num_val": about["splits"]["val"]["num_images"],
        "num_classes": len(about["classes"]),
        "num_shards": sum(len(split["shards"]) for split in about["splits"].values()),
        "num_amended": len(about["amended"]),
        "num_remarks": len(about["remarks"]),
        "num_quarantined": len(about["quarantined"]),
        "num_duplicates": len(about["duplicates"]),
        "num_bytes": sum(entry["size"] for entry in about["files"]),
    }


if __name__ == "__main__":
    program.run(main)
