"""The four programs of the pipeline (shard, train, evaluate, register), their Kubeflow components and shared code."""

import importlib.util
import sys

if importlib.util.find_spec("pydantic") is None:  # a program started with another Python than that of .venv
    print(
        f"error: {sys.executable} lacks the packages of this repository. Install them (make install) and use "
        ".venv/bin/python.",
        file=sys.stderr,
    )
    sys.exit(78)
