"""Data sets of the lab's own."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from api.http.schemas.examples import DATASET_EXAMPLE
from service.model.names import DIGEST_PATTERN


class DatasetSubmission(BaseModel):
    """A data set of your own: its two files are uploaded as artifacts first."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [DATASET_EXAMPLE]})

    name: Annotated[str, Field(min_length=1, max_length=100)]
    train_sha256: Annotated[str, Field(pattern=DIGEST_PATTERN)]
    test_sha256: Annotated[str, Field(pattern=DIGEST_PATTERN)]


class Dataset(BaseModel):
    """A registered data set."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(examples=["npz:my_images"])
    train_sha256: str
    test_sha256: str
    channels: int
    height: int
    width: int
    classes: int
    train_count: int
    test_count: int
    test_images_in_train: int | None = Field(
        default=None, description="Test images that are training images too: counted when files are registered."
    )


class DatasetList(BaseModel):
    items: list[Dataset]
