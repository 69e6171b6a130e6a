"""What a cluster gives every step and every node of a training as environment: the one list of it.

Addresses and limits come from a config map, secrets by the names of their keys, the rest is the same everywhere.
"""

FIXED = {"HOME": "/tmp", "VGG_CACHE": "/store/cache", "VGG_JOURNAL": "/store/tracking"}  # noqa: S108  # of a container
ADDRESSES = {  # keys of the config map, and whether a step can do without
    "VGG_STORE": False,
    "MLFLOW_TRACKING_URI": False,
    "AWS_ENDPOINT_URL": True,
    "AWS_DEFAULT_REGION": True,
    "AWS_REQUEST_CHECKSUM_CALCULATION": True,
    "AWS_RESPONSE_CHECKSUM_VALIDATION": True,
    "VGG_CACHE_BYTES": True,  # and limits that suit a site
    "VGG_HANG_SECONDS": True,
    "VGG_S3_PATIENCE_SECONDS": True,
    "VGG_S3_TIMEOUT_SECONDS": True,
}
STORE_SECRET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
TRACKING_SECRET = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
