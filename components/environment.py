"""python -m components.environment: print all environment variables that the programs read, as a Markdown table."""

from __future__ import annotations

from components import program
from runtime.environment import VARIABLES


def main() -> None:
    program.Parser("components.environment", __doc__).parse_args()
    for title, variables in VARIABLES.items():
        print(f"\n| {title} | default | meaning |\n|---|---|---|")
        for variable in variables:
            print(f"| `{variable.name}` | {variable.default_in_words()} | {variable.meaning} |")


if __name__ == "__main__":
    program.run(main)
