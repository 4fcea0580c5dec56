"""One request from the caller's options to the queue: checked once, tokenised once, sliced and joined by rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ragturbo.checks import check_output, check_retrieval_options, check_steps, choose_mode, whole
from ragturbo.config import MAX_IMAGES, Compose
from ragturbo.engine import options
from ragturbo.engine.neighbors import EncodePairs, resolve_neighbors
from ragturbo.engine.notes import TextNote
from ragturbo.engine.result import Result, Retrieved
from ragturbo.engine.timings import host_stage
from ragturbo.errors import DeadlineExceeded
from ragturbo.model.inject import check_equal_grids
from ragturbo.neighbor import Neighbor

if TYPE_CHECKING:
    from ragturbo.engine.database import DatabaseGeneration
    from ragturbo.model.bundle import Bundle

DEFAULT_W = 0.8
_WANTED = {"np": "float", "pt": "float", "latent": "latent"}


@dataclass(eq=False)
class Request:
    """B images: per-row tensors with B rows, options that all rows share, and what the queue and the caller need."""

    # Rows
    latents: Tensor
    """(B, c, h, w) fp32, unit Gaussian noise."""
    lam: Tensor
    """(B,) fp32, for all neighbours; NaN: each has its own."""
    w: Tensor
    """(B,) fp32, Eq. 3."""
    min_score: Tensor
    """(B,) fp32; -inf: no limit."""
    input_ids: Tensor | None = None
    """(B, L) int64, or None if `text` or `text_kv` is given."""
    text: Tensor | None = None
    """(B, L, D) hidden states, from the caller or the prompt cache."""
    text_kv: Tensor | None = None
    """(B, L, ΣC) keys and values of the folded UNet's cross-attentions, from the prompt cache."""
    query_ids: Tensor | None = None
    """(B, P, L) int64: texts other than the prompt to search by, a query or P phrases of the prompt."""
    searched: Tensor | None = None
    """(B, P) bool: False for texts that pad the phrases to P; None if all are searched."""
    query_key: Tensor | None = None
    """(B, K) fp32: a key to search by."""
    negative_ids: Tensor | None = None
    negative_text: Tensor | None = None
    retrieved: Retrieved | None = None
    """Neighbours chosen by the caller; None: the engine searches `database`."""
    texts: tuple[tuple[str, ...], ...] = ()
    """Per image, the words of its queries, for retrievers that search by words; "" in a padding one."""
    seeds: tuple[int | None, ...] = ()
    """For schedulers that draw noise at each step; None if the caller gave latents or a generator."""

    # Shared by all rows
    mode: str = "none"
    k: int = 0
    """Neighbours of each query."""
    database: DatabaseGeneration | None = None
    num_inference_steps: int = 1
    guidance_scale: float = 0.0
    per: str = "sample"
    output_type: str = "uint8"
    min_bucket: int = 1
    """Pieces of one request all run in the largest bucket, so that their images have the bits of one bucket."""

    # For the caller's Output
    postprocess: Callable[[Any], Any] | None = None
    neighbors: list[list[Neighbor]] | None = None
    """Per prompt, the neighbours chosen by the caller."""
    repeats: int = 1
    """Images per prompt."""
    notes: list[str | TextNote] = field(default_factory=list)
    log_notes: bool = False
    """Whether the notes are logged once they are complete: they may quote the prompts."""
    timings: dict[str, float] = field(default_factory=dict)
    started: float = 0.0
    """time.perf_counter() when the call began."""

    # In the queue. Slices and joined requests get their own.
    timeout: float | None = None
    pieces: tuple[Request, ...] = field(default=(), init=False)
    queued_at: float = field(default_factory=time.monotonic, init=False)
    future: Future[Result] = field(default_factory=Future, init=False)

    @classmethod
    def make(
        cls,
        bundle: Bundle,
        database: DatabaseGeneration | None,
        prompt: str | Sequence[str] | None = None,
        *,
        encode_pairs: EncodePairs,
        started: float,
        compose_by_default: Compose = False,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        num_images_per_prompt: int = 1,
        mode: str | None = None,
        num_neighbors: int | None = None,
        min_score: float | None = None,
        lam: float | Sequence[float] | None = None,
        w: float | Sequence[float] | None = None,
        per: str | None = None,
        query: str | Sequence[str] | Tensor | None = None,
        neighbors: Sequence[Any] | None = None,
        compose: bool | Callable[[str], list[str]] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        postprocess: Callable[[Any], Any] | None = None,
        timeout: float | None = None,
    ) -> Request:
        """Check the options of `Generator.__call__` and turn them into rows.

        Args:
            encode_pairs: runs the engine's `encode_pairs` on the device's thread.
            started: time.perf_counter() when the call began.
            compose_by_default: `compose` where the call does not say and it has an effect.

        Raises:
            InvalidRequest: with the option, its value and the reason.
        """
        unet, factor = bundle.unet, bundle.vae.factor
        check_output(output_type, postprocess, timeout)
        prompts, n = options.check_prompts(prompt, prompt_embeds, bundle.text.width)
        repeats = whole("num_images_per_prompt", num_images_per_prompt, 1, max(1, MAX_IMAGES // n))
        has_key = prompts is not None or query is not None
        resolved = choose_mode(
            mode,
            has_adapter=bundle.adapter is not None,
            can_retrieve=database is not None or neighbors is not None,
            has_key=has_key or neighbors is not None,
        )
        chosen = options.check_neighbors(neighbors, n)
        given = {
            "w": w, "lam": lam, "num_neighbors": num_neighbors, "min_score": min_score, "neighbors": neighbors,
            "query": query, "per": per, "compose": compose or None,
        }  # fmt: skip
        check_retrieval_options(resolved, mode, given, has_key=has_key)
        can_compose = resolved != "none" and prompts is not None and query is None and neighbors is None
        cut = options.choose_compose(compose, compose_by_default) if can_compose else None
        k = options.choose_num_neighbors(
            resolved, num_neighbors, chosen, bundle.info.num_neighbors, composed=cut is not None
        )
        steps, guidance = check_steps(num_inference_steps, guidance_scale, bundle.sampling)
        negative = options.check_negative(
            negative_prompt,
            negative_prompt_embeds,
            n,
            guidance=guidance,
            width=bundle.text.width,
            distilled=bundle.sampling.distilled,
        )
        height, width = options.choose_size(height, width, latents, factor=factor, default=bundle.default_size)
        cells = (height // factor, width // factor)
        seeds, noise = options.make_noise(
            seed, generator, latents, prompts=n, repeats=repeats, shape=(bundle.vae.channels, *cells)
        )
        query_texts, query_key = options.check_query(query, n, bundle.text.key_dim)
        count = n * repeats
        lam_rows = options.per_image("lam", lam, float("nan"), count, n)
        w_rows = options.per_image("w", w, DEFAULT_W, count, n, most=1.0)
        min_scores = torch.full((count,), options.check_min_score(min_score))
        timings: dict[str, float] = {}
        notes: list[str | TextNote] = []
        if resolved in ("slerp", "lerp"):
            theirs = database.grid if database is not None else unet.grid(*[bundle.default_size // factor] * 2)
            if mode is None and unet.grid(*cells) != theirs and all(value is None for value in given.values()):
                # Nobody asked for slerp: an image of another size is generated without it.
                notes.append(
                    f"generated without retrieval: slerp, the default without an adapter, cannot blend the database's "
                    f"features into an image of {height}x{width} pixels"
                )
                resolved, k, cut = "none", 0, None
            else:
                check_equal_grids(unet.grid(*cells), theirs, size=(height, width))

        def tokens(texts: list[str] | None, what: str, *, retrieves: bool = True) -> Tensor | None:
            if texts is None:
                return None
            encoded = bundle.text.tokenize(texts)
            for i, (value, dropped, unknown) in enumerate(zip(texts, encoded.dropped, encoded.unknown, strict=True)):
                if dropped or unknown:
                    notes.append(TextNote(what, value, dropped, unknown, i if retrieves else None))
            return _repeat(encoded.input_ids, repeats)

        with host_stage("tokenize", timings, bundle.device):
            ids = tokens(prompts, "prompt")
            query_ids, searched = tokens(query_texts, "query"), None
            texts: list[tuple[str, ...]] = [(text,) for text in query_texts or prompts or []]
            if query_ids is not None:
                query_ids = query_ids[:, None]
            elif cut is not None and prompts is not None:
                phrases, joined = options.cut_into_phrases(prompts, cut)
                notes += [TextNote("prompt", prompts[i], 0, (), None, joined=n) for i, n in joined.items()]
                if len(phrases[0]) > 1:
                    # Part of the prompts, whose notes are those of their phrases.
                    encoded = bundle.text.tokenize([text for row in phrases for text in row]).input_ids
                    query_ids = _repeat(encoded.view(len(prompts), -1, encoded.shape[-1]), repeats)
                    searched = _repeat(torch.tensor([[bool(text) for text in row] for row in phrases]), repeats)
                    texts = phrases
            negative_ids = tokens(negative, "negative prompt", retrieves=False)
        retrieved = named = None
        if chosen is not None:
            retrieved, named = resolve_neighbors(
                chosen, database, encode_pairs, image_size=bundle.default_size, repeats=repeats, dtype=bundle.dtype
            )
        timings["check"] = time.perf_counter() - started - timings["tokenize"]
        return cls(
            latents=noise,
            lam=lam_rows,
            w=w_rows,
            min_score=min_scores,
            input_ids=ids,
            text=_embeds(prompt_embeds, repeats),
            query_ids=query_ids,
            searched=searched,
            query_key=None if query_key is None else _repeat(query_key, repeats),
            negative_ids=negative_ids,
            negative_text=_embeds(negative_prompt_embeds, repeats),
            retrieved=retrieved,
            texts=tuple(text for text in texts for _ in range(repeats)),
            seeds=tuple(seeds),
            mode=resolved,
            k=k,
            database=database if resolved != "none" and chosen is None else None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            per=per or "sample",
            output_type=output_type,
            postprocess=postprocess,
            neighbors=named,
            repeats=repeats,
            notes=notes,
            timings=timings,
            started=started,
            timeout=timeout,
        )

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def queries(self) -> int:
        """Searches of each image."""
        return 1 if self.query_ids is None else self.query_ids.shape[1]

    @property
    def want(self) -> str:
        """What the engine returns: "uint8", "float" or "latent"."""
        return _WANTED.get(self.output_type, "uint8")

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests with equal keys may run as one batch."""
        tensors = [getattr(self, name) for name in _OPTIONAL_ROWS]
        return (
            tuple(self.latents.shape[1:]),
            tuple(None if t is None else tuple(t.shape[1:]) for t in tensors),
            None if self.retrieved is None else tuple(self.retrieved.h_retr.shape[1:]),
            self.mode,
            self.k,
            id(self.database),
            self.num_inference_steps,
            self.guidance_scale,
            self.per,
            self.want,
            self.min_bucket,
        )

    @property
    def deadline(self) -> float | None:
        """time.monotonic() after which the caller no longer waits."""
        return None if self.timeout is None else self.queued_at + self.timeout

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def slice(self, start: int, stop: int) -> Request:
        rows = {name: value[start:stop] for name in _ROWS if (value := getattr(self, name)) is not None}
        if self.retrieved is not None:
            rows["retrieved"] = self.retrieved.map(lambda value: value[start:stop])
        return replace(self, **rows)

    def split(self, largest: int) -> tuple[Request, ...]:
        """Return pieces of at most `largest` rows that go through the queue one by one."""
        if len(self) <= largest:
            return (self,)
        starts = range(0, len(self), largest)
        self.pieces = tuple(replace(self.slice(i, i + largest), min_bucket=largest) for i in starts)
        return self.pieces

    @staticmethod
    def join(requests: list[Request], bucket: int) -> Request:
        """Requests of equal keys as one of `bucket` rows; rows past their sum repeat the last one."""
        first, padding = requests[0], bucket - sum(map(len, requests))
        if len(requests) == 1 and not padding:
            return first

        def stack(parts: list[Tensor]) -> Tensor:
            return torch.cat([*parts, parts[-1][-1:].expand(padding, *parts[-1].shape[1:])])

        rows: dict[str, Any] = {}
        for name in _TENSOR_ROWS:
            if getattr(first, name) is not None:
                rows[name] = stack([getattr(request, name) for request in requests])
        if first.retrieved is not None:
            given = [request.retrieved for request in requests if request.retrieved is not None]
            rows["retrieved"] = Retrieved(**{n: stack([getattr(r, n) for r in given]) for n in vars(first.retrieved)})
        for name in ("seeds", "texts"):
            values = tuple(value for request in requests for value in getattr(request, name))
            rows[name] = values + values[-1:] * padding
        return replace(first, **rows)

    def wait(self) -> Result:
        """Wait for the result in the caller's thread; on an error the pieces still in the queue are cancelled."""
        results = []
        for piece in self.pieces or (self,):
            left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            try:
                results.append(piece.future.result(left))
            except BaseException as error:
                self.cancel()
                # In Python 3.11 and later, DeadlineExceeded is also a FutureTimeout.
                timed_out = isinstance(error, FutureTimeout) and not isinstance(error, DeadlineExceeded)
                late = self.late() if timed_out else None
                # The traceback references this frame: a caller that keeps the error would also keep the request.
                del self, piece, results
                if late is not None:
                    raise late from None
                raise
        return Result.join(results)

    def cancel(self) -> None:
        for piece in self.pieces or (self,):
            piece.future.cancel()

    def late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"no image after timeout={self.timeout} s")


_OPTIONAL_ROWS = (
    "input_ids", "text", "text_kv", "query_ids", "searched", "query_key", "negative_ids", "negative_text"
)  # fmt: skip
_TENSOR_ROWS = ("latents", "lam", "w", "min_score", *_OPTIONAL_ROWS)
_ROWS = (*_TENSOR_ROWS, "seeds", "texts")


def _repeat(rows: Tensor, repeats: int) -> Tensor:
    return rows if repeats == 1 else rows.repeat_interleave(repeats, 0)


def _embeds(embeds: Tensor | None, repeats: int) -> Tensor | None:
    if embeds is None:
        return None
    # A copy: the caller may reuse its buffer before the request runs.
    embeds = embeds.detach().to("cpu", copy=True)
    return _repeat(embeds, repeats)
