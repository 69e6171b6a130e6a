"""Wording of messages."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """The number, with thousands separators, and the noun in its singular or plural: "1 epoch", "2 epochs"."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"
