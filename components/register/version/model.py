"""The packaged model as MLflow keeps it: code, files, signature, an example, and the packages that it imports."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from components.closure import ROOT
from components.register.version.package import requirements


def arguments(files: dict[str, str], jpeg: bytes) -> dict[str, Any]:
    """Of mlflow.pyfunc.log_model and save_model.  files: by name, see Package.write.  jpeg: an example of the input."""
    import pandas as pd

    example = pd.DataFrame({"image": [base64.b64encode(jpeg).decode()]})  # as a request: JSON holds no bytes
    return {
        "python_model": str(Path(__file__).with_name("served.py")),
        "artifacts": files,
        "code_paths": [str(ROOT / "vgg"), str(ROOT / "runtime")],
        "signature": _signature("localiser" in files),
        "input_example": (example, {"top_k": 5}),
        "pip_requirements": requirements(),
    }


def _signature(localised: bool) -> Any:
    """Parameters and outputs.  Not the inputs: MLflow would turn every form but a DataFrame away before the model.

    localised: whether it gives boxes.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    outputs = {
        "classes": DataType.long,
        "wnids": DataType.string,
        "names": DataType.string,
        "probabilities": DataType.double,
    }
    columns: list[Any] = [
        *(ColSpec(Array(kind), name) for name, kind in outputs.items()),
        ColSpec(Array(DataType.double), "embedding", required=False),
    ]
    params = [ParamSpec("top_k", DataType.long, 5), ParamSpec("embedding", DataType.boolean, False)]
    if localised:
        columns.append(ColSpec(Array(Array(DataType.long)), "boxes", required=False))
        params.append(ParamSpec("boxes", DataType.boolean, True))
    return ModelSignature(outputs=Schema(columns), params=ParamSchema(params))
