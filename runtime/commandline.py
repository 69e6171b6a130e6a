"""Command lines of the programs."""

from __future__ import annotations

import argparse
import re
import sys
from typing import NoReturn

from runtime.errors import WrongParameters

NUMBERS = {"int": "an integer", "float": "a number"}
INVALID = re.compile(r"^argument (.+): invalid (int|float) value: (.+)$")  # argparse's words, with Python's type names


class Parser(argparse.ArgumentParser):
    """argparse that exits with the code of WrongParameters on wrong usage."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(f"python -m {module}", None, description, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.end(f"{self.prog}: {INVALID.sub(_in_words, message)}")

    def end(self, message: str) -> NoReturn:
        print(message, file=sys.stderr)
        sys.exit(WrongParameters.exit_code)


def _in_words(found: re.Match[str]) -> str:
    return f"{found[1]}: must be {NUMBERS[found[2]]}, not {found[3]}"
