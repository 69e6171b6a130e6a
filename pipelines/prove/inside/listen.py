"""A server that accepts connections and says nothing: what a step must not reach.  Argument: PORT.

It ends by itself after an hour, if nobody deletes its pod.
"""

from __future__ import annotations

import json
import socket
import sys
import time

SECONDS = 3600.0

end = time.monotonic() + SECONDS
with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as server:  # noqa: S104  # nosec B104: other pods are to reach it
    print(json.dumps({"port": server.getsockname()[1]}), flush=True)
    server.settimeout(1.0)
    while time.monotonic() < end:
        try:
            server.accept()[0].close()
        except TimeoutError:
            continue
