"""Command lines of the programs."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from runtime.errors import WrongParameters


class Parser(argparse.ArgumentParser):
    """argparse that exits with the code of WrongParameters on wrong usage."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(f"python -m {module}", None, description, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.end(f"{self.prog}: {message}")

    def end(self, message: str) -> NoReturn:
        print(message, file=sys.stderr)
        sys.exit(WrongParameters.exit_code)
