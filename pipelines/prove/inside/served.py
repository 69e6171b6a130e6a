"""A registered version, served as its card says, and asked for digits that were not in its training.

Arguments: the version, models:/NAME@ALIAS, and a free PORT.  Prints {asked, right, seconds}: images, right answers,
time to the last.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

from vgg.sharding.sources import Digits

NUM_IMAGES, START_SECONDS = 50, 240.0
model, port = sys.argv[1:]
address = f"http://127.0.0.1:{port}"


def first_wnids(images: list[bytes]) -> list[str]:
    """The best answer for every image."""
    rows = [[base64.b64encode(image).decode()] for image in images]
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}, "params": {"top_k": 1}}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310  # nosec B310: loopback
        return [row["wnids"][0] for row in json.load(answer)["predictions"]]


def wait(server: subprocess.Popen[bytes], until: float) -> None:
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/ping", timeout=5).close()  # noqa: S310  # nosec B310
            return
        except OSError:
            time.sleep(1.0)
    raise SystemExit(f"the server did not start: exit code {server.poll()}")


began = time.monotonic()
command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
# a version brings its own vgg and runtime, of the day it was made
own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
with subprocess.Popen([*command, "--host", "127.0.0.1", "--port", port], stdout=sys.stderr, env=own) as server:
    try:
        wait(server, began + START_SECONDS)
        source = Digits()
        originals = source.originals("val")[:NUM_IMAGES]
        answers = first_wnids([source.read(original) for original in originals])
        wanted = [source.classes[original.label].wnid for original in originals]
        seconds = time.monotonic() - began
    finally:
        server.terminate()
right = sum(answer == wnid for answer, wnid in zip(answers, wanted, strict=True))
print(json.dumps({"asked": len(wanted), "right": right, "seconds": seconds}))
