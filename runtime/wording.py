"""Wording of messages."""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Iterable, Sequence

SHOWN = 5


def counted(number: float, noun: str) -> str:
    """The number, with thousands separators, and the noun in its singular or plural: "1 epoch", "2 epochs"."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def some(items: Sequence[str], separator: str = ", ") -> str:
    """The first five, and the number of the others: a message is short however much data it is about.

    Give all of them to the Problem as `everything`: the programs write them to a file.
    """
    more = [f"and {len(items) - SHOWN:,} more"] if len(items) > SHOWN else []
    return separator.join([*items[:SHOWN], *more])


def listing(items: Sequence[str]) -> str:
    """As some(), on indented lines of their own."""
    return "  " + some(items, "\n  ")


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """ "; did you mean 'epochs'?", or an empty string if no known word is similar."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def print_in_every_locale() -> None:
    """From now on, print() escapes characters that standard output's encoding lacks, as standard error does.

    Output that the caller has closed goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
