"""Request and response models: OpenAI's fields and ragturbo's. Unknown fields are refused, never ignored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from ragturbo.config import MAX_NEIGHBORS, MAX_SEED, MODES

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class ImageRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, description="What the image should show.")]
    model: Annotated[str | None, Field(description="An id listed by /v1/models. Optional.")] = None
    n: Annotated[int | None, Field(ge=1, description="Number of images; their seeds are seed, seed + 1, …")] = None
    size: Annotated[
        str | None, Field(pattern=rf"^(auto|{SIZE.pattern})$", description='"auto" or "<width>x<height>".')
    ] = None
    response_format: Annotated[Literal["b64_json"] | None, Field(description="URLs are not supported.")] = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="The same seed gives the same image.")] = None
    mode: Annotated[Literal[MODES] | None, Field(description="How to blend.")] = None  # type: ignore[valid-type]
    num_neighbors: Annotated[int | None, Field(ge=1, le=MAX_NEIGHBORS, description="Neighbours to blend in.")] = None
    w: Annotated[float | None, Field(ge=0, le=1, description="Weight of the target in slerp and lerp.")] = None
    min_score: Annotated[
        float | None, Field(allow_inf_nan=False, description="Neighbours with a lower score are not used.")
    ] = None
    compose: Annotated[bool | None, Field(description="Neighbours for each noun phrase of the prompt.")] = None
    return_neighbors: Annotated[bool | None, Field(description="List the neighbours in the response.")] = None

    def call_options(self) -> dict[str, Any]:
        """Return the keyword arguments for Generator.agenerate, without the fields that were left out."""
        names = ("seed", "mode", "num_neighbors", "w", "min_score", "compose")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        if (match := SIZE.fullmatch(self.size or "")) is not None:
            options["width"], options["height"] = int(match[1]), int(match[2])
        return options | {"num_images_per_prompt": self.n or 1, "output_type": self.output_format or "png"}


def limited_request(max_prompt: int, max_images: int) -> type[ImageRequest]:
    """Return ImageRequest with this server's limits, which its schema then states."""
    fields = ImageRequest.model_fields
    return create_model(
        "ImageRequest",
        __base__=ImageRequest,
        prompt=(Annotated[str, Field(min_length=1, max_length=max_prompt)], fields["prompt"]),
        n=(Annotated[int | None, Field(ge=1, le=max_images)], fields["n"]),
    )


class NeighborData(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    caption: str | None
    score: float | None
    lam: float | None
    used: bool
    cosine: float | None
    bm25: float | None


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


class SwapRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    path: Annotated[
        str | None, Field(min_length=1, description="A folder on the server; null: reopen the current database.")
    ] = None


class SwapResponse(BaseModel):
    path: str
    generation: int
    pairs: int
