"""What the endpoint takes and gives: OpenAI's fields, and ours. A field that is not here is refused, never ignored."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from ragturbo.config import MODES
from ragturbo.output import Output
from ragturbo.request import MAX_NEIGHBORS, MAX_SEED

MEDIA = ("png", "jpeg", "webp")
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class ImageRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, description="What the image should show.")]
    model: Annotated[str | None, Field(description="The id in /v1/models; may be left out.")] = None
    n: Annotated[int | None, Field(ge=1, description="Images: seed, seed + 1, …")] = None
    size: Annotated[
        str | None, Field(pattern=rf"^(auto|{SIZE.pattern})$", description='"auto" or "<width>x<height>".')
    ] = None
    response_format: Annotated[Literal["b64_json"] | None, Field(description="URLs are not served.")] = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="The same seed gives the same image.")] = None
    mode: Annotated[Literal["adapter", "slerp", "lerp", "none"] | None, Field(description="How it is blended.")] = None
    num_neighbors: Annotated[int | None, Field(ge=1, le=MAX_NEIGHBORS, description="Neighbours to blend in.")] = None
    w: Annotated[float | None, Field(ge=0, le=1, description="Weight of the target, in slerp and lerp.")] = None
    min_score: Annotated[
        float | None, Field(allow_inf_nan=False, description="Neighbours that score less are not used.")
    ] = None
    return_neighbors: Annotated[bool | None, Field(description="Name the pairs that were blended in.")] = None

    def call_options(self) -> dict[str, Any]:
        """The keyword arguments of Generator.agenerate; what was left out stays out."""
        options: dict[str, Any] = {
            name: value
            for name in ("seed", "mode", "num_neighbors", "w", "min_score")
            if (value := getattr(self, name)) is not None
        }
        if (match := SIZE.fullmatch(self.size or "")) is not None:
            options["width"], options["height"] = int(match[1]), int(match[2])
        return options | {"num_images_per_prompt": self.n or 1, "output_type": self.output_format or "png"}


assert set(MODES) == {"adapter", "slerp", "lerp", "none"}


def limited(max_prompt: int, max_images: int) -> type[ImageRequest]:
    """ImageRequest with this server's limits, so that its schema states them."""
    fields = ImageRequest.model_fields
    return create_model(
        "ImageRequest",
        __base__=ImageRequest,
        prompt=(Annotated[str, Field(min_length=1, max_length=max_prompt)], fields["prompt"]),
        n=(Annotated[int | None, Field(ge=1, le=max_images)], fields["n"]),
    )


class NeighborData(BaseModel):
    id: int
    caption: str | None
    score: float | None
    """The retriever's own."""
    lam: float | None
    used: bool


class ImageData(BaseModel):
    b64_json: str
    seed: int | None
    lam: float | None
    neighbors: list[NeighborData] | None = None


class ImagesResponse(BaseModel):
    created: int
    model: str
    size: str
    output_format: str
    mode: str
    data: list[ImageData]
    timings: dict[str, float]
    """Seconds by stage."""
    notes: list[str]


class ModelData(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ragturbo"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelData]


class Health(BaseModel):
    status: str


class Swap(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    path: Annotated[str | None, Field(min_length=1, description="A folder here; null: the one in use, read anew.")] = (
        None
    )


class Swapped(BaseModel):
    path: str
    generation: int
    pairs: int


def finite(value: float) -> float | None:
    """JSON has no NaN: the score of a neighbour nobody searched for is null."""
    return value if math.isfinite(value) else None


def neighbors_of(output: Output, i: int) -> list[dict[str, Any]]:
    """Without sources and thumbnails: where the pairs came from is the server's business."""
    row = output.neighbors[i] if output.neighbors else []
    return [
        {"id": n.id, "caption": n.caption, "score": finite(n.score), "lam": finite(n.lam), "used": n.used} for n in row
    ]
