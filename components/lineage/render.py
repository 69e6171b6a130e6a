"""A chain for people: a tree at 100 columns, or a diagram for Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.lineage.links import STAGE, Link
from components.tracking.tracker import flat
from runtime.parameters import read_yaml
from runtime.wording import counted, some

WIDTH = 100
LABEL = 12  # columns of a line's name
PARAMETERS_SHOWN = 12
MARKS = {"verified": "✓ verified", "damaged": "✗ DAMAGED", "not reached": "– not reached"}


def tree(link: Link, project: Path, indent: str = "", branch: str = "", seen: set[int] | None = None) -> Iterator[str]:
    """Lines of the tree.  project: parameters are compared with those of its params.yaml."""
    seen = set() if seen is None else seen
    mark = f"   {MARKS[link.state]}" if link.state else ""
    yield f"{indent}{branch}{link}{mark}"
    indent += {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
    bar = indent + ("│  " if link.inputs else "   ")
    if id(link) in seen:
        yield f"{bar}as above"
        return
    seen.add(id(link))
    for label, text in lines(link, project):
        yield from textwrap.wrap(
            text, WIDTH, initial_indent=f"{bar}{label:{LABEL}}", subsequent_indent=f"{bar}{'':{LABEL}}",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    for below in link.inputs:
        yield from tree(below, project, indent, "└─ " if below is link.inputs[-1] else "├─ ", seen)


def lines(link: Link, project: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of everything that is known about a link."""
    yield from link.facts.items()
    if link.params:
        yield "parameters", parameters(link, project)
    record = link.record
    if code := record.get("code"):
        yield "code", commit(code.get("git", {}))
    for label, key in (("image", "image"), ("Kubeflow", "pipeline_run")):
        if record.get(key):
            yield label, str(record[key])
    if machine := record.get("machine"):
        yield "machine", shown_machine(machine)
    if libraries := record.get("libraries"):
        yield "libraries", ", ".join(f"{name} {number}" for name, number in libraries.items() if number)
    if link.where:
        yield "found in", some(link.where)
    if link.used_by:
        yield "used by", some(link.used_by)
    for note in link.notes:
        yield "not known", note
    for finding in link.findings:
        yield "wrong" if link.state == "damaged" else "note", finding


def commit(git: dict[str, Any]) -> str:
    """A commit in words."""
    if not git.get("commit"):
        return "commit not recorded"
    dirty = {None: " (changes not recorded)", True: " (dirty: with changes that were not committed)"}
    return f"{git['commit']}{dirty.get(git.get('dirty'), '')}"


def shown_machine(machine: dict[str, Any]) -> str:
    ranks = machine.get("ranks") or 1
    where = f"{machine['gpu']}, CUDA {machine['cuda']}" if machine.get("gpu") else str(machine.get("cpu"))
    threads = f", {counted(machine['threads'], 'thread')}" if machine.get("threads") and not machine.get("gpu") else ""
    return f"{f'{ranks} × ' if ranks > 1 else ''}{where}{threads}, Python {machine.get('python')}"


def parameters(link: Link, project: Path) -> str:
    """The parameters that differ from params.yaml; briefly all, without one."""
    own = dict(flat(link.params))
    try:
        document, _, _ = read_yaml(project / "params.yaml")
        there = dict(flat(document[STAGE[link.kind]]))
    except Exception:  # no project here, or one of other parameters
        named = [f"{name} {value}" for name, value in own.items()]
        more = len(named) - PARAMETERS_SHOWN
        return ", ".join(named[:PARAMETERS_SHOWN]) + (f", and {more} more (--json)" if more > 0 else "")
    changed = [
        f"{name} {own.get(name, 'absent')} (there {there.get(name, 'absent')})"
        for name in sorted(own.keys() | there.keys())
        if own.get(name) != there.get(name)
    ]
    return f"as in params.yaml, but {some(changed)}" if changed else "as in params.yaml"


def mermaid(chain: Link) -> Iterator[str]:
    """Lines of a Mermaid flowchart, from the source to the version."""
    links = list(chain.all())
    names = {id(link): f"{link.kind}{number}" for number, link in enumerate(links)}
    yield "flowchart LR"
    for link in links:
        git = link.record.get("code", {}).get("git", {})
        text = [link.kind, _short(link.title), link.facts.get("result", ""), _short(git.get("commit") or "")]
        text += [MARKS[link.state]] if link.state else []
        yield f'    {names[id(link)]}["{"<br>".join(part.replace(chr(34), "#quot;") for part in text if part)}"]'
    for link in links:
        for below in link.inputs:
            yield f"    {names[id(below)]} --> {names[id(link)]}"
    for state, colour in (("damaged", "#f8d7da"), ("verified", "#d4edda")):
        if found := [names[id(link)] for link in links if link.state == state]:
            yield (
                f"    style {','.join(found)} fill:{colour}"
                if len(found) == 1
                else "\n".join(f"    style {name} fill:{colour}" for name in found)
            )


def _short(text: str) -> str:
    """A digest, abbreviated; other texts as they are."""
    return f"{text[:12]}…" if len(text) > 30 and "/" not in text else text
