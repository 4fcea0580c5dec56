"""What a graph is recorded for: everything about a batch but its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ragturbo.engine.request import Request
from ragturbo.engine.tables import Tables
from ragturbo.errors import InvalidRequest


@dataclass(frozen=True)
class Spec:
    """The properties that a recording depends on. Batches with equal specs share a recording."""

    rows: int
    latents: tuple[int, ...]
    length: int
    """Tokens of a prompt."""
    has_ids: bool
    """True if prompts are token ids, False if they are hidden states or cached keys and values."""
    cached: bool
    """Keys and values of all cross-attentions come from the prompt cache, on the device."""
    query: str
    """Source of the search key: "prompt", "ids" (another text), "key" (given) or "none"."""
    mode: str
    k: int
    """Neighbours of an image, those of all its phrases."""
    per: str
    steps: int
    want: str
    retrieval: str
    """Where the search and the read of the features happen. "none"; "given" with the request; "resident": both on the
    device; "fetched": search on the device, read on the host; "host": both on the host."""
    stored: tuple[str, int, int, int] | None = None
    """Features: type, stride, tokens, channels."""
    grid: tuple[int, int] | None = None
    centred: bool = False
    phrases: int = 1
    """Queries of an image, each of which finds k / phrases neighbours."""
    hot: bool = False
    """Some features may be in the device cache."""

    @classmethod
    def of(cls, request: Request, tables: Tables | None, length: int) -> Spec:
        given = request.text if request.text_kv is None else request.text_kv
        query = "prompt" if given is None else "none"
        if request.query_key is not None:
            query = "key"
        elif request.query_ids is not None:
            query = "ids"
        return cls(
            rows=len(request),
            latents=tuple(request.latents.shape[1:]),
            length=length if given is None else given.shape[1],
            has_ids=given is None,
            cached=request.text_kv is not None,
            query=query if request.mode != "none" else "none",
            phrases=request.queries,
            mode=request.mode,
            per=request.per,
            steps=request.num_inference_steps,
            want=request.want,
            **_retrieval_of(request, tables),
        )

    @property
    def split(self) -> bool:
        """Whether the host searches, or reads features, between two segments."""
        return self.retrieval in ("fetched", "host")

    @property
    def searches(self) -> bool:
        return self.retrieval in ("resident", "fetched")

    def key_shape(self, width: int) -> tuple[int, ...]:
        """Of the keys to search by."""
        return (self.rows, width) if self.phrases == 1 else (self.rows, self.phrases, width)

    @property
    def label(self) -> str:
        return f"{self.rows} x {self.latents}, {self.mode}, k {self.k}, {self.steps} steps, retrieval {self.retrieval}"


def _retrieval_of(request: Request, tables: Tables | None) -> dict[str, Any]:
    if request.mode == "none":
        return {"k": request.k, "retrieval": "none"}
    if request.retrieved is not None:
        shape = request.retrieved.h_retr.shape
        return {"k": shape[1], "retrieval": "given", "stored": ("given", 0, shape[2], shape[3])}
    if tables is None:
        raise InvalidRequest("no database to search: give database= or neighbors=")
    geometry = tables.database.database.geometry
    form = "host" if tables.keys is None else "resident" if tables.rows.resident else "fetched"
    return {
        "k": request.k * request.queries,
        "retrieval": form,
        "stored": (geometry.dtype, tables.rows.stride, geometry.tokens, geometry.channels),
        "grid": tables.database.grid,
        "centred": tables.keys is not None and tables.keys.centred,
        "hot": form != "resident" and tables.rows.device_rows is not None,
    }
