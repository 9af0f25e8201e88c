"""Whether the service is alive and ready, and who leads its cluster."""

from typing import Literal

from pydantic import BaseModel, Field

from service.model.json import JsonObject


class Alive(BaseModel):
    status: Literal["ok"] = Field(examples=["ok"])


class Ready(BaseModel):
    status: Literal["ready"]
    version: str = Field(examples=["0.1.0"])
    dispatcher_leads: bool = Field(description="Jobs are accepted without one too; they wait.")


class SetAside(BaseModel):
    """A part of the environment that failed and gets no work until it is tried again."""

    owner: str = Field(description="node, device, data_folder or artifact_root.", examples=["artifact_root"])
    name: str = Field(description="Its host, device or path.", examples=["/srv/artifacts"])
    node: str = Field(description="Where that was seen, as Ray names it; empty for everywhere.", examples=[""])
    dataset: str = Field(description="The data set whose tasks it keeps waiting; empty for all.", examples=["cifar10"])
    reason: str
    losses: int = Field(description="Attempts in a row that it was tried with.", examples=[1])
    since: str
    retry_at: str


class Cluster(BaseModel):
    """Who leads, and what it last said."""

    leading: bool
    dispatcher: str | None
    lease_expires_at: str | None
    set_aside: list[SetAside] = Field(default=[], description="What gets no work for now, with the reason.")
    status: JsonObject = Field(description="Of the cluster: ready, cpus, gpus, nodes ...", examples=[{"cpus": 16.0}])
