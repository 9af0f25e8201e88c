"""Checkpoints that are registered."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from service.lab.checkpoints import TOLERANCE, Upload
from service.model.json import JsonObject
from service.model.names import DIGEST_PATTERN
from service.specs.base import Number
from service.specs.names import Architecture

SHA256 = "9c818143cfd10e15676234d9e38dbf9e0d968d847d151aa08a8cf4f190080b17"
EXAMPLE: JsonObject = {
    "name": "resnet18_from_the_hub",
    "architecture": "resnet18",
    "dataset": "cifar10",
    "weights_sha256": SHA256,
    "keys": {"module.": ""},
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.247, 0.2435, 0.2616],
    "expected_clean_accuracy": 0.95,
}
PerChannel = Annotated[list[float], Field(max_length=16)]


class CheckpointSubmission(BaseModel):
    """A safetensors file, uploaded as an artifact first. Pickles are refused."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    name: Annotated[str, Field(min_length=1, max_length=100)]
    architecture: Architecture
    dataset: Annotated[str, Field(max_length=200, description="Whose images and classes the network is for.")]
    weights_sha256: Annotated[str, Field(pattern=DIGEST_PATTERN)]
    keys: Annotated[dict[str, str], Field(max_length=1000)] = Field(
        default_factory=dict, description="Prefixes of the file's tensor names, and what the network has instead."
    )
    mean: PerChannel = Field(default_factory=list, description="Subtracted from images in [0, 1], one a channel.")
    std: PerChannel = Field(default_factory=list, description="Divided by after that.")
    expected_clean_accuracy: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="On all test images. It is measured before anything else: jobs fail where it is another.",
    )
    tolerance: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None, description=f"How far from `expected_clean_accuracy` it may be; {TOLERANCE} when left out."
    )

    @property
    def upload(self) -> Upload:
        return Upload(
            name=self.name,
            architecture=self.architecture,
            dataset=self.dataset,
            uploaded_sha256=self.weights_sha256,
            keys=self.keys,
            mean=self.mean,
            std=self.std,
            expected_clean_accuracy=self.expected_clean_accuracy,
            tolerance=self.tolerance,
        )


class Checkpoint(BaseModel):
    """A registered checkpoint: `weights_sha256` are the weights as they are used, with the normalisation."""

    name: str = Field(examples=["resnet18_from_the_hub"])
    architecture: str = Field(examples=["resnet18"])
    dataset: str = Field(examples=["cifar10"])
    channels: int = Field(examples=[3])
    height: int = Field(examples=[32])
    width: int = Field(examples=[32])
    classes: int = Field(examples=[10])
    weights_sha256: str = Field(examples=[SHA256])
    size_bytes: int = Field(examples=[44_730_000])
    parameters: int = Field(examples=[11_173_962])
    uploaded_sha256: str = Field(examples=[SHA256])
    keys: dict[str, str] = Field(examples=[{"module.": ""}])
    mean: list[float] = Field(examples=[[0.4914, 0.4822, 0.4465]])
    std: list[float] = Field(examples=[[0.247, 0.2435, 0.2616]])
    expected_clean_accuracy: float | None = Field(examples=[0.95])
    tolerance: float | None = Field(examples=[0.01])
    stripped_prefix: str | None = Field(
        description="What all tensor names of the file had in front, after `keys`, and lost.", examples=["_orig_mod."]
    )
    converted_from: list[str] = Field(description="Precisions that became float32.", examples=[["float16"]])
    created_by: str = Field(examples=["ada"])
    created_at: str = Field(examples=["2026-01-01T12:00:00.000Z"])


class CheckpointList(BaseModel):
    items: list[Checkpoint]
