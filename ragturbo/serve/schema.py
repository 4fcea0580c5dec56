"""Request and response models: OpenAI's fields and ragturbo's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model

from ragturbo.config import MAX_NEIGHBORS, MAX_SEED, MODES
from ragturbo.output import ENCODINGS

SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
# Why the other values of OpenAI's fields are refused: part of the field's description and of the error.
NO_URLS = "This server does not store images, so it has no URLs."
ONE_QUALITY = "This server has one quality."
NO_STREAM = "Responses are not streamed."
NO_MODERATION = "There is no moderation beyond what the operator installed; its level cannot be chosen."
OPAQUE = "Images are opaque."
COMPRESSION = ", ".join(f"{kind} {options['quality']}" for kind, options in ENCODINGS.items() if "quality" in options)
UNUSED = "Accepted for OpenAI's clients and not used."


def _is_false(value: bool) -> bool:
    if value:
        raise ValueError("must be false")
    return value


# Literal[False] would accept 0.
OnlyFalse = Annotated[bool, AfterValidator(_is_false), WithJsonSchema({"type": "boolean", "const": False})]
Size = Annotated[str, WithJsonSchema({"type": "string", "pattern": SIZE})]


class ImageRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, description="What the image should show.")]
    model: Annotated[str | None, Field(description="An id listed by /v1/models. Default: this server's model.")] = None
    n: Annotated[int | None, Field(ge=1, description="Number of images. Default 1.")] = None
    size: Annotated[
        Size | None, Field(description='"auto" or "<width>x<height>" in pixels. Default "auto", the model\'s own size.')
    ] = None
    response_format: Annotated[Literal["b64_json"] | None, Field(description=NO_URLS)] = None
    output_format: Annotated[Literal["png", "jpeg", "webp"] | None, Field(description='Default "png".')] = None
    seed: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_SEED,
            description="The same seed gives the same image; n images use seed, seed + 1, … Default: random.",
        ),
    ] = None
    mode: Annotated[
        Literal[MODES] | None,  # type: ignore[valid-type]
        Field(
            description='How neighbours are blended in. Default: "adapter" with an adapter and a database, "slerp" '
            'with only a database, "none" without one.'
        ),
    ] = None
    num_neighbors: Annotated[int | None, Field(ge=1, le=MAX_NEIGHBORS, description="Neighbours to blend in.")] = None
    w: Annotated[
        float | None, Field(ge=0, le=1, description="Weight of the target in modes slerp and lerp. Default 0.8.")
    ] = None
    min_score: Annotated[
        float | None, Field(allow_inf_nan=False, description="Neighbours with a lower score are not used.")
    ] = None
    compose: Annotated[bool | None, Field(description="Find neighbours for each noun phrase of the prompt.")] = None
    return_neighbors: Annotated[bool | None, Field(description="List the neighbours in the response.")] = None

    quality: Annotated[Literal["auto", "standard"] | None, Field(description=ONE_QUALITY)] = None
    background: Annotated[Literal["auto", "opaque"] | None, Field(description=OPAQUE)] = None
    moderation: Annotated[Literal["auto"] | None, Field(description=NO_MODERATION)] = None
    stream: Annotated[OnlyFalse | None, Field(description=NO_STREAM)] = None
    partial_images: Annotated[int | None, Field(ge=0, le=0, description=NO_STREAM)] = None
    user: Annotated[str | None, Field(description=UNUSED)] = None
    safety_identifier: Annotated[str | None, Field(description=UNUSED)] = None
    style: Annotated[None, Field(description="Describe the style in the prompt.")] = None
    output_compression: Annotated[None, Field(description=f"The quality is fixed: {COMPRESSION}.")] = None
    complexity: Annotated[None, Field(description=ONE_QUALITY)] = None
    frame_count: Annotated[None, Field(description="There is no GIF output.")] = None
    frame_duration_ms: Annotated[None, Field(description="There is no GIF output.")] = None
    svg: Annotated[None, Field(description="There is no SVG output.")] = None

    def call_options(self) -> dict[str, Any]:
        """Return the keyword arguments for Generator.agenerate but the size, without the fields that were left out."""
        names = ("seed", "mode", "num_neighbors", "w", "min_score", "compose")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        return options | {"num_images_per_prompt": self.n or 1, "output_type": self.output_format or "png"}


NULL_ONLY = frozenset(name for name, field in ImageRequest.model_fields.items() if field.annotation is type(None))
"""Fields of OpenAI's that this server does not have; OpenAI's clients may send them as null."""
LENIENT = NULL_ONLY | {"quality", "moderation"}
"""Known fields whose unsupported values a lenient server ignores: the response has the same form without them."""
FIELD_OF_OPTION = {
    "num_images_per_prompt": "n",
    "height": "size",
    "width": "size",
    "output_type": "output_format",
    **{name: name for name in ImageRequest.model_fields},
}
"""The field that sets each option of Generator.__call__."""


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
    score: Annotated[float | None, Field(description="The retriever's own.")]
    lam: Annotated[float | None, Field(description="Its weight; see `lam` of the image.")]
    used: Annotated[bool, Field(description="False if its score is below min_score.")]
    cosine: Annotated[float | None, Field(description="Similarity of the keys.")]
    bm25: Annotated[float | None, Field(description="Score of the words, where the retriever searches by them.")]


class ImageData(BaseModel):
    b64_json: Annotated[str, Field(description="The file, in base64.")]
    seed: int | None
    lam: Annotated[float | None, Field(description="Strength of the retrieval; null where there is none.")]
    neighbors: Annotated[list[NeighborData] | None, Field(description="Only with return_neighbors.")] = None


class ImagesResponse(BaseModel):
    created: Annotated[int, Field(description="Seconds since 1970.")]
    model: str
    size: str
    output_format: str
    mode: Annotated[str, Field(description="The mode that was used.")]
    data: Annotated[list[ImageData], Field(description="One entry for each image.")]
    timings: Annotated[dict[str, float], Field(description="Seconds by stage.")]
    notes: Annotated[
        list[str],
        Field(description="Words the model does not know, tokens that were cut off, fields that were ignored."),
    ]


class ModelData(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="When this server started, in seconds since 1970.")]
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
