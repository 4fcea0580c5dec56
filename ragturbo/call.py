"""One call on its way through a Generator: checked, tokenised, cut into batches, waited for, put together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragturbo.engine.executor import Executor, Place
from ragturbo.engine.database import DatabaseSource
from ragturbo.engine.step import Engine, Retrieved, StepBatch, StepResult
from ragturbo.engine.timings import host_stage
from ragturbo.errors import DeadlineExceeded, InvalidRequest
from ragturbo.model.bundle import Bundle
from ragturbo.output import Neighbor, Output, encode, to_pil
from ragturbo.request import Abilities, Plan, Request, resolve

log = logging.getLogger("ragturbo")


@lru_cache(maxsize=1)
def _finishers() -> ThreadPoolExecutor:
    """Futures are finished here, so that neither the device's thread nor an event loop's does it."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="ragturbo-finish")


@lru_cache(maxsize=1)
def _encoders() -> ThreadPoolExecutor:
    """Files are encoded here. A pool of their own: finishing waits for it, and would wait for itself in one pool."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="ragturbo-encode")


def abilities(bundle: Bundle, source: DatabaseSource | None) -> Abilities:
    return Abilities(
        has_adapter=bundle.adapter is not None,
        has_database=source is not None,
        distilled=bundle.info.distilled,
        factor=bundle.vae.factor,
        multiple=bundle.vae.factor,
        default_size=bundle.default_size,
        latent_channels=bundle.vae.channels,
        text_width=bundle.text.width,
        key_width=bundle.text.key_dim,
        max_steps=4 if bundle.info.distilled else 1000,
        num_neighbors=bundle.info.num_neighbors,
    )


@dataclass
class Call:
    request: Request
    plan: Plan
    source: DatabaseSource | None
    futures: list[Future[StepResult]]
    given: list[list[Neighbor]] | None
    """Per prompt, the neighbours the caller chose."""
    notes: list[str]
    started: float
    took: dict[str, float]
    deadline: float | None

    @classmethod
    def start(
        cls,
        bundle: Bundle,
        engine: Engine,
        executor: Executor,
        source: DatabaseSource | None,
        prompt: Any,
        options: dict[str, Any],
        started: float,
        *,
        quiet: bool = False,
        place: Place | None = None,
    ) -> Call:
        request = Request.of(prompt, options)
        plan = resolve(request, abilities(bundle, source))
        if plan.mode in ("slerp", "lerp"):
            _check_grids(bundle, source, plan)
        took: dict[str, float] = {}
        with host_stage("tokenize", took, bundle.device):
            batch, notes = _batch(bundle, request, plan, source)
        given = None
        if plan.neighbors is not None:
            batch.retrieved, given = _given(bundle, engine, executor, source, plan)
        if not quiet:
            for note in notes:
                log.warning("%s", note)
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        took["check"] = time.perf_counter() - started - took["tokenize"]
        futures = executor.submit(_split(batch, executor.max_rows), request.timeout, place)
        return cls(request, plan, source, futures, given, notes, started, took, deadline)

    def wait(self) -> Output:
        """In the caller's thread."""
        results = []
        for future in self.futures:
            left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            try:
                results.append(future.result(left))
            except FutureTimeout as error:
                self.cancel()
                if isinstance(error, DeadlineExceeded):
                    raise
                raise DeadlineExceeded(f"no image after timeout={self.request.timeout} s") from None
            except BaseException:
                self.cancel()
                raise
        return self.output(results)

    async def awaited(self) -> Output:
        """On an asyncio loop. The deadline is kept to the moment, even where the device has not got round to it."""
        import asyncio

        future = asyncio.wrap_future(self.future())
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            done, _ = await asyncio.wait({future}, timeout=left)
            if done:
                return future.result()
        finally:
            # Nothing happens to a future that is done.
            future.cancel()
        raise DeadlineExceeded(f"no image after timeout={self.request.timeout} s")

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()

    def future(self) -> Future[Output]:
        outer = _OutputFuture(self)
        left, lock = len(self.futures), threading.Lock()
        # Emptied by the last one: inner futures that kept the outer one would be a cycle.
        waiting = [outer]

        def one_done(_: Future[StepResult]) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                _finishers().submit(waiting.pop().finish)

        for future in self.futures:
            future.add_done_callback(one_done)
        return outer

    def output(self, results: list[StepResult]) -> Output:
        plan, request = self.plan, self.request
        images = _images(results, request)
        neighbors: list[list[Neighbor]] = []
        lam: list[float] = []
        for result in results:
            lam += result.lam.tolist()
            neighbors += self._neighbors(result, start=len(neighbors))
        timings = dict(self.took)
        for result in results:
            for stage, seconds in result.timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
        # A call's later pieces wait for its earlier ones: the call's own wait is the first piece's.
        timings["queue"] = min(result.timings["queue"] for result in results)
        now = time.perf_counter()
        timings["answer"] = now - max(result.ended for result in results)
        timings["total"] = now - self.started
        bucket = max(r.bucket for r in results)
        return Output(images, neighbors, lam, plan.seeds, plan.mode, bucket, timings, self.notes)

    def _neighbors(self, result: StepResult, start: int) -> list[list[Neighbor]]:
        if self.given is None and self.source is None:
            return [[] for _ in range(len(result.ids))]
        # One list an image, of one tuple a neighbour.
        tables = (value.tolist() for value in (result.ids, result.scores, result.cosine, result.valid))
        rows = [list(zip(*row, strict=True)) for row in zip(*tables, strict=True)]
        if self.given is None:
            assert self.source is not None
            make = self.source.neighbor
            return [[make(id, score, lam, used) for id, score, lam, used in row if id >= 0] for row in rows]
        given = [self.given[(start + i) // self.plan.per_prompt] for i in range(len(rows))]
        return [
            [replace(n, score=score, lam=lam, used=used) for n, (_, score, lam, used) in zip(own, row, strict=True)]
            for own, row in zip(given, rows, strict=True)
        ]


class _OutputFuture(Future[Output]):
    """Cancelling it cancels what still waits of the call."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call: Call | None = call

    def cancel(self) -> bool:
        call, cancelled = self._call, super().cancel()
        if cancelled and call is not None:
            call.cancel()
        return cancelled

    def finish(self) -> None:
        # From here on nothing is left to cancel, and whoever keeps the result keeps no more than that.
        call, self._call = self._call, None
        if call is None or not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(call.output([f.result(0) for f in call.futures]))
        except BaseException as error:
            self.set_exception(error)
            # The error's traceback holds this frame.
            del self, call


def _check_grids(bundle: Bundle, source: DatabaseSource | None, plan: Plan) -> None:
    """Equal numbers of tokens are not enough: 4x16 cells laid over 8x8 would blend one place into another."""
    factor, unet = bundle.vae.factor, bundle.unet
    own = unet.grid(plan.height // factor, plan.width // factor)
    if source is not None:
        geometry = source.database.geometry
        theirs = (geometry.height, geometry.width)
    else:
        theirs = unet.grid(*[bundle.default_size // factor] * 2)
    if own != theirs:
        raise InvalidRequest(
            f"mode={plan.mode!r} blends equal grids: an image of {plan.height}x{plan.width} has features of "
            f"{own[0]}x{own[1]}, its neighbours {theirs[0]}x{theirs[1]}. Generate at the neighbours' size, or use "
            "mode='adapter', which takes any grid."
        )


def _batch(bundle: Bundle, request: Request, plan: Plan, source: DatabaseSource | None) -> tuple[StepBatch, list[str]]:
    notes: list[str] = []
    text = bundle.text

    def ids(texts: list[str] | None, what: str) -> Tensor | None:
        if texts is None:
            return None
        tokens = text.tokenize(texts)
        for value, dropped, unknown in zip(texts, tokens.dropped, tokens.unknown, strict=True):
            note = _token_note(what, value, dropped, unknown)
            if note and note not in notes:
                notes.append(note)
        return tokens.input_ids

    def rows(embeds: Tensor | None) -> Tensor | None:
        if embeds is None:
            return None
        embeds = embeds.detach().to("cpu")
        return embeds.expand(plan.count, -1, -1) if len(embeds) == 1 else embeds.repeat_interleave(plan.per_prompt, 0)

    batch = StepBatch(
        latents=plan.latents,
        lam=plan.lam,
        w=plan.w,
        min_score=torch.full((plan.count,), plan.min_score),
        input_ids=ids(plan.prompts, "prompt"),
        text=rows(request.prompt_embeds),
        query_ids=ids(plan.query_texts, "query"),
        query_key=plan.query_key,
        negative_ids=ids(plan.negative, "negative prompt"),
        negative_text=rows(request.negative_prompt_embeds),
        texts=tuple(plan.query_texts or plan.prompts or ()),
        seeds=tuple(plan.seeds),
        mode=plan.mode,
        k=plan.k,
        source=None if plan.mode == "none" or plan.neighbors is not None else source,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=float(request.guidance_scale),
        per=request.per or "sample",
        want=plan.want,
    )
    return batch, notes


def _token_note(what: str, value: str, dropped: int, unknown: Sequence[str]) -> str:
    shown = value if len(value) <= 60 else value[:57] + "..."
    parts = []
    if dropped:
        parts.append(f"its last {dropped} tokens were cut off")
    if unknown:
        parts.append(f"the model does not know: {', '.join(unknown[:8])}")
    return f"{what} {shown!r}: {'; '.join(parts)}" if parts else ""


def _split(batch: StepBatch, largest: int) -> list[StepBatch]:
    """Pieces of at most `largest` rows. They all run in the largest bucket, so that one call has one bucket."""
    if len(batch) <= largest:
        return [batch]
    return [replace(batch.slice(i, i + largest), min_bucket=largest) for i in range(0, len(batch), largest)]


def _given(
    bundle: Bundle, engine: Engine, executor: Executor, source: DatabaseSource | None, plan: Plan
) -> tuple[Retrieved, list[list[Neighbor]]]:
    """The caller's own neighbours: from the database by id, or encoded on the spot (the paper's Fig. 2, uncached)."""
    assert plan.neighbors is not None
    flat = [entry for entries in plan.neighbors for entry in entries]
    stored = [_id_of(entry) for entry in flat]
    pairs = [(i, _pair_of(entry)) for i, entry in enumerate(flat) if stored[i] is None]
    known = [(i, number) for i, number in enumerate(stored) if number is not None]
    keys: list[Any] = [None] * len(flat)
    rows: list[Any] = [None] * len(flat)
    chosen: list[Any] = [None] * len(flat)
    if known:
        if source is None:
            raise InvalidRequest("neighbors names ids, but there is no database to take them from")
        if missing := [number for _, number in known if not source.holds(number)]:
            raise InvalidRequest(f"neighbors names id {missing[0]}, which the database does not have")
        ids = torch.tensor([number for _, number in known])
        found = source.gather(ids[None], torch.zeros(1, len(known)))
        for j, (i, number) in enumerate(known):
            keys[i], rows[i], chosen[i] = found.keys[0, j], found.h_retr[0, j], source.neighbor(number)
    if pairs:
        captions = [caption for _, (caption, _) in pairs]
        images = torch.stack([_pixels(image, bundle.default_size) for _, (_, image) in pairs])
        new_keys, new_rows = executor.call(lambda: engine.encode_pairs(captions, images))
        for j, (i, (caption, _)) in enumerate(pairs):
            keys[i], rows[i] = new_keys[j].float().cpu(), new_rows[j].cpu()
            chosen[i] = Neighbor(-1, float("nan"), float("nan"), caption, "given with the request")
    k = plan.k
    order = [p * k + j for p in range(len(plan.neighbors)) for _ in range(plan.per_prompt) for j in range(k)]
    shape = (plan.count, k)
    retrieved = Retrieved(
        ids=torch.arange(len(flat))[order].view(shape),
        scores=torch.full(shape, float("inf")),
        keys=torch.stack([keys[i] for i in order]).view(*shape, -1),
        h_retr=torch.stack([rows[i].to(bundle.dtype) for i in order]).view(*shape, *rows[0].shape),
    )
    return retrieved, [chosen[p * k : (p + 1) * k] for p in range(len(plan.neighbors))]


def _id_of(entry: Any) -> int | None:
    if isinstance(entry, Neighbor):
        if entry.id < 0:
            raise InvalidRequest("a Neighbor given with an earlier request is in no database; give (caption, image)")
        return entry.id
    return entry if isinstance(entry, int) and not isinstance(entry, bool) else None


def _pair_of(entry: Any) -> tuple[str, Any]:
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
        return entry
    raise InvalidRequest(f"neighbors holds {str(entry)[:60]!r}; give ids, Neighbors or (caption, image) tuples")


def _pixels(image: Any, size: int) -> Tensor:
    """PIL image or path -> (3, size, size) in [-1, 1], centre-cropped as in a database build."""
    from ragturbo.retrieval.images import square

    return torch.from_numpy(np.array(square(image, size))).permute(2, 0, 1).float() / 127.5 - 1


def _images(results: list[StepResult], request: Request) -> Any:
    kind = request.output_type
    if kind == "latent":
        return _joined([r.latents for r in results])
    if kind in ("np", "pt"):
        image = _joined([r.image for r in results])
        return image if kind == "pt" else image.permute(0, 2, 3, 1).contiguous().numpy()
    batch = _joined([r.uint8 for r in results]).numpy()
    if request.postprocess is not None:
        shape = batch.shape
        batch = np.asarray(request.postprocess(batch))
        if batch.shape != shape or batch.dtype != np.uint8:
            raise InvalidRequest(f"postprocess gave {batch.dtype} {batch.shape} for uint8 {shape}")
    if kind == "uint8":
        return batch
    if kind == "pil":
        return to_pil(batch)
    if len(batch) == 1:
        return [encode(batch[0], kind)]
    return list(_encoders().map(encode, batch, [kind] * len(batch)))


def _joined(parts: list[Tensor | None]) -> Tensor:
    there = [part for part in parts if part is not None]
    return there[0] if len(there) == 1 else torch.cat(there)
