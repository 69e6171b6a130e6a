"""Run a stage's program many times, without loading its libraries again: python forked.py STAGE ARGUMENTS…

For every line on stdin a forked process runs the program; the answer is a line: {"code": …, "stderr": …}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback


def main() -> None:
    stage, *arguments = sys.argv[1:]

    from components import program

    module = importlib.import_module(f"components.{stage}.__main__")
    names = ["components.stage", "mlflow.store.tracking.sqlalchemy_store"]  # no connection: the database changes
    if stage != "shard":
        names += ["vgg.training.loop", "vgg.training.task", "vgg.evaluation.evaluate", "mlflow.pyfunc", "pandas"]
    for name in names:
        importlib.import_module(name)
    for _line in sys.stdin:
        with tempfile.TemporaryFile() as file:
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                os.dup2(file.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDWR), 1)
                sys.argv = [stage, *arguments]
                code = 1
                try:
                    program.run(module.main)
                except SystemExit as ended:
                    code = ended.code if isinstance(ended.code, int) else 1
                except BaseException:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            file.seek(0)
            print(json.dumps({"code": code, "stderr": file.read().decode(errors="replace")}), flush=True)


if __name__ == "__main__":
    main()
