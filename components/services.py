"""The services of docker/compose.yaml: their passwords, and their buckets.

`env` (default) prints the file .env that Docker Compose and the shell read, with new passwords.  `buckets` makes
the buckets in the store at AWS_ENDPOINT_URL; those that exist are kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from components import program

BUCKETS = ("vgg", "mlflow", "dvc")  # shards and checkpoints; MLflow's files; DVC's remote
ENV = """\
# Passwords of docker/compose.yaml; keep this file secret, and as long as the volumes.
POSTGRES_PASSWORD={postgres}
S3_SECRET_KEY={store}
MLFLOW_ADMIN_PASSWORD={admin}
MLFLOW_SECRET_KEY={key}
# For the programs:  set -a; source .env; set +a
MLFLOW_TRACKING_URI=http://localhost:5000
MLFLOW_TRACKING_USERNAME=admin
MLFLOW_TRACKING_PASSWORD={admin}
# MLflow's files through the server: the store has another name for it than for this machine
MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=false
MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD=false
AWS_ENDPOINT_URL=http://localhost:8333
AWS_DEFAULT_REGION=us-east-1
AWS_ACCESS_KEY_ID=vgg
AWS_SECRET_ACCESS_KEY={store}
VGG_STORE=s3://vgg/store
"""


def main(argv: Sequence[str] | None = None) -> None:
    flags = program.Parser("components.services", __doc__)
    flags.add_argument("what", nargs="?", choices=["env", "buckets"], default="env")
    if flags.parse_args(argv).what == "buckets":
        make_buckets()
    else:
        # hexadecimal: neither a shell nor an address nor YAML reads a character of it in another way
        words = {name: secrets.token_hex(24) for name in ("postgres", "store", "admin", "key")}
        print(ENV.format(**words), end="")


def make_buckets() -> None:
    """Raises what runtime.store raises: WrongParameters for refused credentials, Unreachable without an answer."""
    from runtime.store.s3 import Prefix

    for name in BUCKETS:
        program.log.info("bucket %s: %s", name, "made" if Prefix(f"s3://{name}").make_bucket() else "exists")


if __name__ == "__main__":
    program.run(main)
