"""The champion, as the tags of its model version describe it.  People can set the alias, and change the tags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError

from components.register import tags as version_tags
from runtime.errors import Refused

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ALIAS = "champion"
Error = Annotated[float, Field(ge=0, le=1)]


class Evaluation(BaseModel):
    """Content of the tag `evaluation`: what the gate compares."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    top1_error: Error
    top5_error: Error
    num_images: int = Field(gt=0)
    data_digest: str = Field(min_length=1)


class Tags(BaseModel):
    """The tags of a version that this pipeline registered, as far as the gate needs them."""

    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    evaluation: Json[Evaluation]


@dataclass(frozen=True)
class Champion:
    version: str
    weights_sha256: str
    evaluation: dict[str, Any]


def read(name: str, found: ModelVersion) -> Champion:
    """The champion of a registered model.  Raises Refused if its tags are not those of a version of this pipeline."""
    try:
        tags = Tags.model_validate(version_tags.read(found.tags))
    except ValidationError as error:
        raise Refused(
            f"registered model {name!r}: version {found.version} has the alias {ALIAS}, but {_wrong(error)}; "
            "nothing can be compared with it. Was the alias set by hand, or a tag changed? In MLflow, give the alias "
            "to a version that this pipeline registered, or delete the alias to register without a comparison. Or run "
            "components.register with --replace-champion, which makes it `previous`."
        ) from None
    return Champion(str(found.version), tags.weights_sha256, tags.evaluation.model_dump())


def _wrong(error: ValidationError) -> str:
    """The first wrong tag in words."""
    first = error.errors()[0]
    tag, *keys = map(str, first["loc"])
    if first["type"] == "missing":
        return f"its tag {tag!r} lacks {'.'.join(keys)}" if keys else f"it has no tag {tag!r}"
    value = str(first["input"])
    shown = value if len(value) <= 60 else f"{value[:60]}…"
    return f"its tag {tag!r} is not valid{f' at {keys[-1]}' if keys else ''}: {shown!r}"
