"""Which addresses answer, from the pod that this runs in.

Arguments: HOST:PORT….  Prints {address: "open", or why it is not}.
"""

from __future__ import annotations

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

SECONDS = 5.0


def answer(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), SECONDS):
            return "open"
    except socket.gaierror as error:
        return f"no such name ({error.strerror})"
    except TimeoutError:
        return f"no answer in {SECONDS:.0f} s"
    except OSError as error:  # a policy may also be enforced by a refusal
        return str(error.strerror or error).lower()


addresses = sys.argv[1:]
with ThreadPoolExecutor(len(addresses)) as pool:
    print(json.dumps(dict(zip(addresses, pool.map(answer, addresses), strict=True))))
