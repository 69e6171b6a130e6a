"""Where a model comes from: version → evaluation → training → data → source, from any of them.

    python -m components.lineage models:/vgg16-digits@champion             the chain, with commits and parameters
    python -m components.lineage models:/vgg16-digits/3 --verify           hash every link that can be reached
    python -m components.lineage reproduce models:/vgg16-digits/3          the commands that train it again

A link is found by its content: in the folders of dvc.yaml, in VGG_STORE, in DVC's cache and remotes, and at the
addresses that its runs name.  What cannot be reached, MLflow or the files, is said and not counted as damage.
Exit code of --verify: 0 if no reachable link is damaged, else 78.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from components import program


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.lineage", __doc__)
    flags.add_argument(
        "reference",
        help="models:/NAME@ALIAS, models:/NAME/NUMBER, ID of an MLflow run, digest (….dir), or the folder (local,\n"
        "store: or s3://) of a checkpoint, shards or predictions, or its manifest.json",
    )
    form = flags.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything that is recorded, as JSON")
    form.add_argument("--mermaid", action="store_true", help="a diagram for Markdown")
    flags.add_argument("--verify", action="store_true", help="hash every link that can be reached")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["reproduce"]:
        from components.lineage import reproduce

        reproduce.main(arguments[1:])
        return
    args = parser().parse_args(arguments)
    from components.lineage import render, verify, walk
    from runtime import environment
    from runtime.errors import Refused
    from runtime.wording import listing

    project = environment.project()
    steps = walk.Walk(project)
    chain = steps.start(args.reference)
    if args.verify:
        verify.verify(chain, steps.server, steps.locator)
    if args.json:
        program.say(json.dumps({"chain": chain.as_json(), "not_asked": steps.unasked}, indent=1))
    else:
        program.say("\n".join(render.mermaid(chain) if args.mermaid else render.tree(chain, project)))
    for reason in steps.unasked:
        program.log.warning("not asked: %s", reason)
    if args.verify:
        if wrong := verify.broken(chain):
            raise Refused(f"{args.reference}: the chain is broken:\n{listing(wrong)}", wrong)
        program.log.info("%s", verify.summary(chain))


if __name__ == "__main__":
    program.run(main)
