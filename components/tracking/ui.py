"""MLflow's pages of the runs: the server of a local database, and the address that shows the runs of training."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
import webbrowser

from components import program
from components.tracking import view
from components.tracking.access import EXPERIMENT, database_file
from components.tracking.address import shown, tracking_uri
from runtime.errors import Unreachable, WrongParameters
from runtime.stopping import die_with_parent

START_SECONDS = 120.0
END_SECONDS = 10.0
# jobs are of MLflow's GenAI half: eight processes and 2 GB that these pages do not need
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def show(port: int, is_opened: bool = True) -> None:
    """Print the address of the runs, open it where a browser is, and serve a local database until interrupted.

    Raises WrongParameters if there are no runs yet or the port is taken, Unreachable if the server does not answer.
    """
    uri = tracking_uri()
    if uri.startswith("http"):  # a server has its pages
        _present(uri, is_opened)
        return
    if uri.startswith("sqlite") and not database_file(uri).is_file():
        raise WrongParameters(f"{database_file(uri)}: does not exist, so there are no runs yet. Run: make run")
    server = f"http://127.0.0.1:{port}"
    if _answers(port):
        raise WrongParameters(
            f"{server}: something answers there already, perhaps an earlier make ui. Stop it, or take another port: "
            f"make ui PORT={port + 1}"
        )
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    said = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server
    child = subprocess.Popen(
        [*command, "--port", str(port), "--workers", "1"], preexec_fn=die_with_parent, start_new_session=True,
        stdout=said, stderr=said, env={**os.environ, **QUIET},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            if child.poll() is not None or time.monotonic() > deadline:
                said.seek(0)
                raise Unreachable(
                    f"MLflow's server for {shown(uri)} does not start: {said.read().decode(errors='replace')[-2000:]}"
                )
            time.sleep(0.2)
        _present(server, is_opened)
        program.log.info("stop with Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            child.wait()
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_SECONDS)
        child.kill()


def _answers(port: int) -> bool:
    """Whether anything on this machine answers to HTTP at the port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        connection.getresponse()
        return True
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _present(server: str, is_opened: bool) -> None:
    address = view.address(server, _experiment(server))
    print(address, flush=True)
    with contextlib.suppress(webbrowser.Error):
        browser = webbrowser.get()
        if is_opened and type(browser) is not webbrowser.GenericBrowser:  # those are of the terminal, and show no page
            browser.open(address)


def _experiment(server: str) -> str:
    """ID of the experiment.  Raises WrongParameters if the server has none, Unreachable if it does not answer."""
    from components.tracking.access import ask, set_environment

    set_environment()
    answer = ask(server, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT}")
    if answer.status_code == 404:
        raise WrongParameters(f"MLflow at {shown(server)} has no experiment {EXPERIMENT} yet. Run: make run")
    try:
        return str(json.loads(answer.text)["experiment"]["experiment_id"])
    except (ValueError, KeyError, TypeError):
        raise Unreachable(
            f"MLflow at {shown(server)} does not name its experiments: HTTP {answer.status_code}"
        ) from None
