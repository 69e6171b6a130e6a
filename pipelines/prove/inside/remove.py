"""Remove what the runs of pipelines.prove left in MLflow and in the store.

Argument: JSON {name, models, lineages}; name: prove-…, the last part of VGG_STORE; lineages: of the pipeline runs
(tag vgg.lineage).  Prints {removed, left}: lists of what, and of what with the reason.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.tracking import access
from runtime import environment, manifest
from runtime.store import storage

given = json.loads(sys.argv[1])
removed: list[str] = []
left: list[str] = []


def attempt(what: str, removal: Callable[[], bool]) -> None:
    """removal: returns whether there was anything."""
    try:
        if removal():
            removed.append(what)
    except Exception as error:  # whatever it is, the rest is to be removed
        left.append(f"{what}: {' '.join(str(error).split())[:300]}")


def model(client: Any, name: str) -> bool:
    if not client.search_registered_models(f"name = '{name}'"):
        return False
    client.delete_registered_model(name)  # with its versions
    return True


def runs(client: Any, lineage: str) -> bool:
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    if not experiment:
        return False

    def found(query: str) -> list[str]:
        return [run.info.run_id for run in client.search_runs([experiment.experiment_id], query)]

    parents = found(f"tags.`vgg.lineage` = '{lineage}'")
    for run in [*(child for parent in parents for child in found(f"tags.`mlflow.parentRunId` = '{parent}'")), *parents]:
        client.delete_run(run)
    return bool(parents)


def store() -> bool:
    location = environment.STORE.get().rstrip("/")
    if not given["name"].startswith("prove-") or location.rpartition("/")[2] != given["name"]:
        raise ValueError(f"VGG_STORE={location} is not that of {given['name']}; nothing was deleted there")
    if not storage.is_remote(location):
        there = Path(location).exists()
        if there:
            shutil.rmtree(location)
        return there
    from runtime.store.s3 import Prefix

    prefix, outputs = Prefix(location), set[str]()
    listing = {"Bucket": prefix.bucket, "Prefix": prefix.key("")}
    while objects := prefix.client.list_objects_v2(**listing).get("Contents"):  # a page; what is deleted is not listed
        outputs |= {"/".join(item["Key"].removeprefix(prefix.key("")).split("/")[:2]) for item in objects}
        for item in objects:  # one by one: some stores want another checksum for many
            prefix.client.delete_object(Bucket=prefix.bucket, Key=item["Key"])
    for output in outputs:  # the working copies of this volume: runtime.store.mirror
        key = manifest.digest_of(f"{location}/{output}")[: storage.KEY_DIGITS]
        shutil.rmtree(storage.cache_folder() / "work" / key, ignore_errors=True)
    return bool(outputs)


attempt(f"store {environment.STORE.get()}", store)
try:
    mlflow = access.connect()
except Exception as error:
    left.append(f"in MLflow: models {given['models']} and the runs of this proof: {error}")
else:
    for name in given["models"]:
        for registered in (name, f"{name}.lease"):
            attempt(f"model {registered}", lambda registered=registered: model(mlflow, registered))  # type: ignore[misc]
    for lineage in given["lineages"]:
        attempt(f"MLflow runs {lineage[:8]}", lambda lineage=lineage: runs(mlflow, lineage))  # type: ignore[misc]
print(json.dumps({"removed": removed, "left": left}))
