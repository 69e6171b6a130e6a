"""python -m pipelines.optional: give dvc.yaml the optional stages whose section params.yaml has, and only those.

DVC cannot leave a stage out by a parameter: a stage whose section is missing is an error.  make run calls this first.
Mistakes in params.yaml are reported before DVC begins.
A stage's text is in pipelines/stages/STAGE.yaml and is put before the stage `register`, which also gets its outputs;
nothing else is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.program import Parser, log, run
from runtime import manifest
from runtime.errors import WrongParameters

TEXTS = Path(__file__).resolve().parent / "stages"
BEFORE = "  register:\n"
OF_REGISTER = {  # what register reads of a stage: its lines without and with the stage
    "localise": (
        ("      --evaluation metrics/evaluate.json --metrics metrics/register.json\n",
         "      --evaluation metrics/evaluate.json --localiser models/localiser --localisations data/localisations\n"
         "      --metrics metrics/register.json\n"),
        ("      - data/predictions\n      - metrics/evaluate.json\n",
         "      - data/predictions\n      - metrics/evaluate.json\n"
         "      - models/localiser\n      - data/localisations\n"),
    ),
}  # fmt: skip


def with_stages(dvc: str, wanted: Sequence[str]) -> str:
    """dvc.yaml with these optional stages.  Raises WrongParameters if it was changed by hand where they belong."""
    for path in sorted(TEXTS.glob("*.yaml")):
        name, text = path.stem, path.read_text(encoding="utf-8")
        there = f"\n  {name}:\n" in dvc
        if there and name not in wanted:
            if text not in dvc:
                raise WrongParameters(f"dvc.yaml: stage {name!r} is not the text of {path}. Remove it by hand.")
            dvc = dvc.replace(text, "")
            for without, along in OF_REGISTER[name]:
                dvc = _exchanged(dvc, along, without, name)
        elif name in wanted and not there:
            if dvc.count(f"\n{BEFORE}") != 1:
                raise WrongParameters(f"dvc.yaml: no stage 'register' before which to put {name!r}; add {path} by hand")
            dvc = dvc.replace(f"\n{BEFORE}", f"\n{text}{BEFORE}")
            for without, along in OF_REGISTER[name]:
                dvc = _exchanged(dvc, without, along, name)
    return dvc


def _exchanged(dvc: str, old: str, new: str, name: str) -> str:
    """dvc.yaml with other lines in the stage register.  Raises WrongParameters if they are not there once."""
    if dvc.count(old) != 1:
        raise WrongParameters(
            f"dvc.yaml: the stage 'register' does not have these lines once, which go with {name!r}:\n{old}"
            f"They should become:\n{new}Change them by hand, or bring dvc.yaml back (git checkout dvc.yaml)."
        )
    return dvc.replace(old, new)


def main(argv: Sequence[str] | None = None) -> None:
    flags = Parser("pipelines.optional", __doc__)
    flags.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE")
    flags.add_argument("--dvc", type=Path, default=Path("dvc.yaml"), metavar="FILE")
    args = flags.parse_args(argv)
    from runtime.parameters import read_yaml
    from vgg.params import OPTIONAL, load_all

    document, lines, mistakes = read_yaml(args.params)
    # dvc repro would remove the outputs of a stage before it finds a mistake
    sections = load_all(document, str(args.params), lines, mistakes)
    before = args.dvc.read_text(encoding="utf-8")
    after = with_stages(before, [name for name in OPTIONAL if name in sections])
    if after != before:
        manifest.write_atomically(args.dvc, lambda file: file.write(after.encode()))
        log.info("%s: its optional stages are now those of %s", args.dvc, args.params)


if __name__ == "__main__":
    run(main)
