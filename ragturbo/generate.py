"""`generate()` for one line of use, `Generator` for a service. Torch is imported with the first model."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from ragturbo.checks import check_call, check_timeout, default_mode, texts, whole
from ragturbo.config import (
    MAX_PHRASES,
    Compose,
    GeneratorConfig,
    check_device,
    check_dtype,
    has_driver,
    refuse_graphs,
)
from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.keywords import INSTEAD_ATTRIBUTES, named, names, unknown
from ragturbo.messages import many, short
from ragturbo.output import Output

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from diffusers import DiffusionPipeline, SchedulerMixin
    from torch import Tensor

    from ragturbo.engine.database import DatabaseGeneration
    from ragturbo.engine.request import Request
    from ragturbo.engine.request_queue import Reservation
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval import Database

__all__ = ["Generator", "Output", "generate"]

log = logging.getLogger("ragturbo")

P = ParamSpec("P")
T = TypeVar("T")
COUNTS = ("accepted", "finished", "failed", "cancelled", "expired", "rejected", "non_finite")


def _same_parameters(documented: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function that takes **options the parameters of `documented`, for type checkers, help() and completion."""

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        import inspect

        own = inspect.signature(function, eval_str=False)
        theirs = inspect.signature(documented, eval_str=False)
        function.__signature__ = theirs.replace(return_annotation=own.return_annotation)  # type: ignore[attr-defined]
        return named(lambda: Generator.from_pretrained)(function)

    return decorate


class Generator:
    """A model, a database and the thread that runs them. Thread-safe. Close it, or use it in `with`."""

    def __init__(
        self, bundle: Bundle, *, database: Database | str | os.PathLike[str] | None = None,
        config: GeneratorConfig | None = None,
    ) -> None:  # fmt: skip
        """Use a Bundle already in memory; `from_pretrained` loads one."""
        if not hasattr(bundle, "unet") or not hasattr(bundle, "sampling"):
            raise InvalidRequest(
                f"Generator takes a loaded Bundle, not {short(bundle)}: use Generator.from_pretrained({short(bundle)})",
                option="bundle",
            )
        from ragturbo.engine.build import make_engine
        from ragturbo.engine.executor import Executor
        from ragturbo.engine.threads import settle_threads
        from ragturbo.model.one_thread import on_one_thread

        self.config = config or GeneratorConfig()
        self._bundle = bundle
        default = bundle.info.compose if self.config.compose is None else self.config.compose
        self._compose: Compose = False if default is None else default
        networks = bundle.text.text_encoder, bundle.unet.unet, bundle.vae.module
        self._engine = on_one_thread(lambda: make_engine(bundle, self.config), bundle.device, networks)
        self._database: DatabaseGeneration | None = None
        self._swap = threading.Lock()
        self._said_slerp = False
        self._executor = Executor(
            self._engine,
            batch_sizes=self.config.batch_sizes,
            batch_window=self.config.batch_window,
            max_queue=self.config.max_queue,
        )
        # The device thread references the executor, not the Generator: an unused Generator is collected and closed.
        self._finalizer = weakref.finalize(self, self._executor.close)
        self._threads = settle_threads(bundle, self._executor.call)
        if database is not None:
            self.use_database(database)

    @classmethod
    @named(lambda: Generator.__call__)  # type: ignore[has-type]
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | DiffusionPipeline = "shapes",
        *,
        database: Database | str | os.PathLike[str] | Literal[False] | None = None,
        adapter: str | os.PathLike[str] | Literal[False] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        distilled: bool | None = None,
        scheduler: SchedulerMixin | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        engine: str = "auto",
        capture: bool = True,
        retriever: Any = "auto",
        compose: bool | Callable[[str], list[str]] | None = None,
        vae: str = "full",
        attention: str = "auto",
        compile: bool = False,
        host_cache: int | str | None = None,
        device_cache: int | str | None = None,
        batch_sizes: tuple[int, ...] = (1, 2, 4, 8),
        batch_window: float = 0.0,
        max_queue: int = 64,
        prompt_cache: int = 0,
        log_prompts: bool = True,
    ) -> Generator:
        """Load a model, its adapter and its database.

        Args:
            model: "shapes" (embedded), a diffusers folder, a hub id, or a loaded StableDiffusionPipeline, whose modules
                are used, not copied.
            database: a folder or Database; None: the model's own, if it has one; False: none.
            adapter: a folder with adapter.safetensors and optionally decoder_lora; None: the model's own; False: none.
            device, dtype: default to cuda and float16 if there is a GPU, else to cpu and float32, where a large model
                computes in bfloat16 if that is faster and agrees (`gen.info` says so); of a pipeline, to its own.
            distilled: whether the model takes one to four steps without guidance. None: as its ragturbo.json says; if
                it has none, whether its scheduler's timesteps are trailing, or the scheduler is LCM's or TCD's.
            scheduler: of diffusers, instead of the model's.
            local_files_only, revision, cache_dir, token, subfolder, variant: as in diffusers.
            engine: "reference", plain torch on any device; "graph", fused modules, under CUDA graphs on a GPU; "auto",
                the graph engine if it can run the model, else the reference.
            capture: False: the graph engine calls its segments instead of capturing them. On a CPU, "auto" always does.
            retriever: "exact", "scann", "bm25", "hybrid" (keys and words, which finds names), an object with
                search(keys, k, *, exclude=None), or "auto": the one the database was opened with, else the one the
                adapter was trained with, else chosen by the database's size.
            compose: default of the calls; None: as the adapter was trained.
            vae: "full", "tiny", or a folder or id of an AutoencoderTiny.
            attention: of the UNet: "sdpa", "triton", "xformers", or "auto", the fastest measured on this GPU.
            compile: run the graph engine's blocks through torch.compile.
            host_cache, device_cache: bytes for caching features, as a number or like "8GiB".
            batch_sizes: powers of two that requests are padded to and run in.
            batch_window: seconds to wait for more requests before running a batch.
            max_queue: batches that may wait; beyond it, calls raise Overloaded.
            prompt_cache: number of prompts whose encoding is cached.
            log_prompts: whether warnings may quote prompts.

        Raises:
            InvalidRequest: an option has a wrong value or excludes another.
            ModelError: the model cannot be found, loaded or run.
            DatabaseMismatch: another model encoded the database.
        """
        config = GeneratorConfig(
            engine=engine, capture=capture, retriever=retriever, compose=compose, vae=vae, attention=attention,
            compile=compile, host_cache=host_cache, device_cache=device_cache, batch_sizes=batch_sizes,
            batch_window=batch_window, max_queue=max_queue, prompt_cache=prompt_cache, log_prompts=log_prompts,
            dtype=dtype,
        )  # fmt: skip
        # Imported here: `import ragturbo` stays short.
        from ragturbo.model.find import Hub, look

        _check_given(model, adapter, database)
        check_dtype(dtype)
        check_device(device)
        refuse_graphs(engine, capture, on_gpu=str(device) != "cpu" and has_driver())
        hub = Hub(local_files_only, revision, cache_dir, token, subfolder, variant)
        parts: dict[str, Any] = {"adapter": adapter, "distilled": distilled, "scheduler": scheduler}
        # Mistakes are reported before torch is imported and weights are read, which takes seconds.
        if isinstance(model, (str, os.PathLike)):
            parts["folder"] = look(model, hub, adapter=adapter, distilled=distilled, vae=vae).folder
        elif vae != "full" or hub != Hub():
            raise InvalidRequest("vae, revision, subfolder and the like have no effect on a pipeline that is loaded")
        if isinstance(database, (str, os.PathLike)):
            from ragturbo.retrieval import Database as Opened

            database = Opened.open(database)
        from ragturbo.engine.build import choose_device
        from ragturbo.engine.fork import refuse_after_fork
        from ragturbo.model.bundle import Bundle, check_pipeline

        refuse_after_fork()
        if isinstance(model, (str, os.PathLike)):
            where, precision = choose_device(device, dtype)
            bundle = Bundle.load(model, device=where, dtype=precision, vae=vae, **vars(hub), **parts)
        else:
            check_pipeline(model)
            unet: Any = model.unet  # type: ignore[attr-defined]
            where, precision = choose_device(device or unet.device, dtype or unet.dtype)
            bundle = Bundle.from_pipeline(model, device=where, dtype=precision, **parts)
        if database is None:
            database = bundle.database_path
        return cls(bundle, database=None if database is False else database, config=config)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Generator:
        """Load a model from one .safetensors file, as diffusers' from_single_file does.

        Args:
            config: a diffusers folder or hub id of the base model, whose configurations and tokenizer are used; None:
                diffusers guesses it from the weights and loads it from the hub.
            local_files_only, revision, cache_dir, token: for `config`, as in diffusers.
            device, dtype, options: as in `from_pretrained`.
        """
        from ragturbo.model.find import check_single_file

        for name in options:
            if name not in names(cls.from_pretrained):
                raise unknown(name, cls.from_single_file, cls.from_pretrained)
        file = check_single_file(path, config)
        check_dtype(dtype)
        check_device(device)
        from diffusers import StableDiffusionPipeline

        from ragturbo.engine.build import choose_device
        from ragturbo.model.source import quiet

        where, precision = choose_device(device, dtype)
        hub: dict[str, Any] = {
            "local_files_only": local_files_only, "revision": revision, "cache_dir": cache_dir, "token": token
        }  # fmt: skip
        if config is not None:
            hub["config"] = os.fspath(config)
        try:
            with quiet():
                pipe = StableDiffusionPipeline.from_single_file(str(file), **hub)
        # diffusers, the hub's client and safetensors each raise their own errors.
        except Exception as error:
            why = "the configuration of its base model is on the hub, which cannot be reached: give config=, a folder"
            if config is not None or "onnect" not in type(error).__name__:
                why = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            raise ModelError(f"{file} cannot be loaded by diffusers: {why}") from error
        pipe.register_to_config(_name_or_path=str(file))
        # The pipeline was loaded in fp32, which is the precision of a CPU if none was asked for.
        return cls.from_pretrained(pipe, device=where, dtype=dtype if where.type == "cpu" else precision, **options)

    @named(lambda: Generator.from_pretrained)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
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
        reservation: Reservation | None = None,
    ) -> Output:
        """Generate images. An option that would have no effect is an error.

        Args:
            prompt: one text or a list.
            seed: one number, or one per prompt or image; further images of a prompt use seed + 1, … Default: random.
            generator, latents: as in diffusers, instead of `seed`.
            num_images_per_prompt: default 1.
            mode: "adapter" (Eq. 5), "slerp" (Eq. 3), "lerp" or "none". Default: "none" if there is nothing to retrieve
                from, else "adapter", or "slerp" if there is no adapter.
            num_neighbors: pairs to retrieve per image. Default: as the adapter was trained; 1 for slerp and lerp.
            min_score: neighbours with a lower score are not used.
            lam: strength of the adapter, instead of each neighbour's own λ; per call, prompt or image.
            w: weight of the target in slerp and lerp, in [0, 1]; per call, prompt or image. Default 0.8.
            per: angle of slerp: one per "sample" (default) or per "token".
            query: other text, or a key, to search by instead of the prompt.
            neighbors: ids, Neighbors or (caption, image) pairs instead of a search; one list, or one per prompt.
            compose: True: each noun phrase of the prompt, up to four, finds its own neighbours. A function that returns
                a prompt's phrases replaces the built-in rules of English. Default: as in `from_pretrained`.
            negative_prompt, prompt_embeds, negative_prompt_embeds, height, width: as in diffusers.
            num_inference_steps, guidance_scale: as in diffusers. Default: one step without guidance for distilled
                models (consistency models four), else 50 steps and 7.5.
            output_type: "pil", "np", "pt", "latent", "uint8" (B, H, W, 3), "png", "jpeg" or "webp".
            postprocess: runs on the uint8 batch before it is returned; its result is used as is.
            timeout: seconds after which DeadlineExceeded is raised.
            reservation: from `reserve`.

        Returns:
            Output with images, neighbors, lam, seeds, mode, bucket, timings and notes.

        Raises:
            InvalidRequest: an option has a wrong value or no effect.
            Overloaded: the queue is full, or too long for `timeout`.
            DeadlineExceeded: `timeout` has passed.
            GenerationError: the engine failed, or the Generator is closed.
        """
        options = dict(
            seed=seed, generator=generator, latents=latents, num_images_per_prompt=num_images_per_prompt,
            mode=mode, num_neighbors=num_neighbors, min_score=min_score, lam=lam, w=w, per=per, query=query,
            neighbors=neighbors, compose=compose, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, height=height, width=width, output_type=output_type,
            postprocess=postprocess, timeout=timeout, reservation=reservation,
        )  # fmt: skip
        request = self._submit(prompt, options)
        return Output.make(request, request.wait())

    @_same_parameters(__call__)
    def submit(self, prompt: Any = None, **options: Any) -> Future[Output]:
        """Generate without waiting; takes what `__call__` takes. Cancelling the future frees its room in the queue."""
        from ragturbo.output_future import OutputFuture

        return OutputFuture(self._submit(prompt, options))

    @_same_parameters(__call__)
    async def agenerate(self, prompt: Any = None, **options: Any) -> Output:
        """Generate under asyncio; takes what `__call__` takes. Cancelling the task cancels the request, and `timeout`
        holds even if the device is still busy."""
        import asyncio

        from ragturbo.output_future import OutputFuture

        # Tokenising and drawing noise for many prompts would block the event loop.
        submitting = asyncio.ensure_future(asyncio.to_thread(self._submit, prompt, options))
        try:
            request = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            # The thread cannot be stopped: cancel the request once it is submitted.
            submitting.add_done_callback(_cancel_submitted)
            raise
        future = asyncio.wrap_future(OutputFuture(request))
        left = None if request.deadline is None else max(0.0, request.deadline - time.monotonic())
        try:
            done, _ = await asyncio.wait({future}, timeout=left)
            if done:
                return future.result()
        finally:
            # No effect on a future that is done.
            future.cancel()
        raise request.late()

    def warmup(self) -> None:
        """Run every batch size once, so that the first request finds everything loaded, compiled and captured; with
        `compose`, for every number of phrases."""
        # With a prompt cache, a repeated prompt takes another path than a new one.
        times = 2 if self.config.prompt_cache else 1
        options: list[dict[str, Any]] = [{"seed": 0, "output_type": "uint8"}]
        if not self._bundle.sampling.distilled:
            # A step of fifty: every step runs the same modules.
            options[0]["num_inference_steps"] = 1
        if self._compose and self._database is not None and self._bundle.adapter is not None:
            options = [{**options[0], "compose": partial(_repeated, times=phrases)} for phrases in (MAX_PHRASES, 2, 1)]
        # Largest first: the graphs of smaller sizes reuse its memory.
        for size in reversed(self.config.batch_sizes):
            for call in options * times:
                self._submit(["warm up"] * size, dict(call)).wait()
        self._executor.queue.forget_pace()

    def use_database(self, database: Database | str | os.PathLike[str] | None) -> None:
        """Use another Database or folder, or None for none. Accepted requests keep the one they started with."""
        from ragturbo.engine.build import open_database

        opened = None if database is None else open_database(database, self._bundle, self.config)
        with self._swap:
            self._database = opened

    def teach(self, caption: str, image: Any, *, source: str | None = None) -> int:
        """Add a pair to the database, for this Generator's next request and for good. Nothing is trained.

        The pair is encoded on the device thread between two batches, with the model in use, and stored as a build
        stores it. Other processes find it once they call `database.refresh()`.

        Args:
            caption: the text that names what the image shows.
            image: a PIL image, a path or bytes.
            source: the pair's provenance; default: the path of the image, if it is one.

        Returns:
            The pair's id, for `forget`.

        Raises:
            InvalidRequest: caption or image cannot be stored, or there is no database that may be changed.
            DatabaseMismatch: the database was built with other settings than the model's.
            DatabaseError: the database cannot be written.
            GenerationError: the pair could not be encoded, or the Generator is closed.
        """
        from ragturbo.engine.teaching import LoadedEncoder, writable
        from ragturbo.retrieval.one_pair import add_pair

        database = writable(self.database, self._bundle)
        encoder = LoadedEncoder(self._bundle, database, self._executor.call)
        return add_pair(database, caption, image, encoder=encoder, source=source)

    def forget(self, id: int) -> None:
        """Remove a pair from the database; no later request of this Generator finds it. Twice is allowed."""
        from ragturbo.engine.teaching import writable

        writable(self.database, self._bundle).remove([id])

    def load_adapter(self, path: str | os.PathLike[str]) -> None:
        """Load adapter.safetensors and, if the folder has one, decoder_lora; used from the next batch on."""
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidRequest(f"load_adapter takes a folder, not {short(path)}", option="path")
        self._executor.call(lambda: self._engine.load_adapter(path))

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function on the device thread between two batches and return its value, as profilers need it."""
        return self._executor.call(function)

    def encode_prompt(self, prompt: str | Sequence[str]) -> Tensor:
        """Return the hidden states (B, L, D) of prompts on the CPU, for `prompt_embeds` and `negative_prompt_embeds`.
        They carry no search key: pass the text as `query`, too."""
        ids = self._bundle.text.tokenize(texts("prompt", prompt, empty=True)).input_ids
        return self._executor.call(lambda: self._bundle.text.encode(ids.to(self._bundle.device)).hidden_states.cpu())

    @property
    def bundle(self) -> Bundle:
        """The loaded parts: .text, .unet (a view of diffusers' UNet), .vae, .scheduler and .adapter. The device thread
        runs them: use `call` to change one."""
        return self._bundle

    @property
    def healthy(self) -> bool:
        return self._executor.healthy

    def check_room(self, images: int = 1, timeout: float | None = None) -> None:
        """Raise Overloaded if a call for this many images would, before any work is done for it."""
        check_timeout(timeout)
        self._executor.check_room(whole("images", images), timeout)

    def reserve(self, images: int = 1, timeout: float | None = None) -> Reservation:
        """`check_room`, and hold the room: `with gen.reserve(2, 5.0) as room: gen(…, reservation=room)` is not refused
        if it makes no more images."""
        check_timeout(timeout)
        return self._executor.reserve(whole("images", images), timeout)

    def expected_wait(self, images: int = 1) -> float:
        """Seconds until `images` more would be done, by the pace of the last batches; 0 if that is not known yet."""
        return self._executor.queue.expected_wait(whole("images", images))

    @property
    def database(self) -> Database | None:
        return None if self._database is None else self._database.live

    @property
    def default_size(self) -> int:
        """Height and width in pixels that the model was made for."""
        return self._bundle.default_size

    @property
    def info(self) -> dict[str, Any]:
        """What is loaded, and which implementations were chosen."""
        bundle, database = self._bundle, self._database
        return {
            "model": bundle.name,
            "device": str(bundle.device),
            "dtype": str(bundle.dtype).removeprefix("torch."),
            "engine": self._engine.name,
            "ways": self._engine.describe(),
            "distilled": bundle.info.distilled,
            "num_inference_steps": bundle.sampling.steps,
            "guidance_scale": bundle.sampling.guidance_scale,
            "mode": self.default_mode,
            "size": self.default_size,
            "adapter": None if bundle.adapter is None else bundle.adapter.kind,
            "decoder_lora": bundle.has_lora,
            "database": None if database is None else database.info,
            "retriever": None if database is None else database.retriever_name,
            "compose": self._compose if isinstance(self._compose, bool) else "a function",
            "batch_sizes": list(self.config.batch_sizes),
            "threads": self._threads,
        }

    def stats(self) -> dict[str, Any]:
        """Counters since the start."""
        executor, database = self._executor, self._database
        return {
            "waiting": len(executor.queue),
            "running": executor.queue.running,
            **{name: executor.queue.counts[name] for name in COUNTS},
            "batches": dict(sorted(executor.batch_sizes.items())),
            "cache": {} if database is None else database.counters(),
            "generation": None if database is None else database.generation,
        }

    @property
    def default_mode(self) -> str:
        """Mode of a call that does not say, and brings no neighbours of its own."""
        return default_mode(has_adapter=self._bundle.adapter is not None, can_retrieve=self._database is not None)

    def __repr__(self) -> str:
        bundle, database = self._bundle, self.database
        retrieval = "no database" if database is None else f"{many(len(database), 'pair')} in {database.path}"
        dtype = str(bundle.dtype).removeprefix("torch.")
        steps = many(bundle.sampling.steps, "step")
        closed = "" if self._finalizer.alive else ", closed"
        return (
            f"Generator({bundle.name!r}, {bundle.device} {dtype}, engine {self._engine.name!r}, {retrieval}, mode "
            f"{self.default_mode!r}, {steps}, {self.default_size}x{self.default_size}{closed})"
        )

    def __getattr__(self, name: str) -> Any:
        if (instead := INSTEAD_ATTRIBUTES.get(name)) is not None:
            raise AttributeError(f"a Generator has no {name!r}: {instead}", name=name, obj=self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def close(self) -> None:
        """Finish queued requests and end the device thread. Closing twice is allowed."""
        self._finalizer()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _submit(self, prompt: Any, options: dict[str, Any]) -> Request:
        from ragturbo.engine.request import Request

        started = time.perf_counter()
        reservation = options.pop("reservation", None)
        if reservation is not None and not hasattr(reservation, "pieces"):
            raise InvalidRequest(f"reservation={short(reservation)} must come from reserve()", option="reservation")
        with self._swap:
            if self._database is not None:
                self._database = self._database.current()
            database = self._database

        def encode_pairs(captions: list[str], images: Tensor) -> tuple[Tensor, Tensor]:
            return self._executor.call(lambda: self._engine.encode_pairs(captions, images))

        request = Request.make(
            self._bundle, database, prompt, encode_pairs=encode_pairs, started=started,
            compose_by_default=self._compose, **options,
        )  # fmt: skip
        request.log_notes = self.config.log_prompts
        if request.mode == "slerp" and options.get("mode") is None and not self._said_slerp:
            self._said_slerp = True
            log.warning(
                "%s has no adapter: retrieved features are blended in by slerp with w = 0.8, which needs no training. "
                "An adapter, another mode or another w change it",
                self._bundle.name,
            )
        self._executor.submit(request, reservation)
        return request


def _check_given(model: Any, adapter: Any, database: Any) -> None:
    """Raise InvalidRequest unless these are of the kinds that `from_pretrained` takes."""
    for name, value in (("adapter", adapter), ("database", database)):
        if value is True or value == "" or isinstance(value, (list, dict, set, int, float)) and value is not False:
            raise InvalidRequest(
                f"{name}={short(value)}: give a folder, None (the model's own) or False (none)", option=name
            )
    if adapter not in (None, False) and not isinstance(adapter, (str, os.PathLike)):
        raise InvalidRequest(f"adapter={short(adapter)}: give a folder, None or False", option="adapter")
    if isinstance(model, (str, os.PathLike)) and str(model) or hasattr(model, "unet"):
        return
    what = f"={model!r}" if model is None or isinstance(model, (str, int, float)) else f" is a {type(model).__name__}"
    raise InvalidRequest(f"model{what}: give a folder, a hub id, 'shapes' or a loaded pipeline", option="model")


def _repeated(prompt: str, times: int) -> list[str]:
    return [prompt] * times


def _cancel_submitted(submitting: Any) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


_lock = threading.Lock()
_generators: dict[tuple[Any, ...], Generator] = {}


def _forget_generators() -> None:
    # A forked child has none of the parent's device threads and makes its own Generators.
    global _lock
    _lock = threading.Lock()
    _generators.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_generators)


@named(lambda: Generator.from_pretrained)
def generate(
    prompt: str | Sequence[str] | None = None,
    *,
    model: str | os.PathLike[str] = "shapes",
    database: Database | str | os.PathLike[str] | Literal[False] | None = None,
    adapter: str | os.PathLike[str] | Literal[False] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    distilled: bool | None = None,
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
) -> Any:
    """Generate with a model that is loaded on the first call and kept for later ones.

    Args:
        model, database, adapter, device, dtype, distilled: as in `Generator.from_pretrained`.
        prompt and the other options: as in `Generator.__call__`.

    Returns:
        One image for one text, a list (or batch) of images for a list or for several images per prompt.
    """
    options: dict[str, Any] = dict(
        seed=seed, generator=generator, latents=latents, num_images_per_prompt=num_images_per_prompt, mode=mode,
        num_neighbors=num_neighbors, min_score=min_score, lam=lam, w=w, per=per, query=query, neighbors=neighbors,
        compose=compose, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds, num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale, height=height, width=width, output_type=output_type,
        postprocess=postprocess, timeout=timeout,
    )  # fmt: skip
    _check_given(model, adapter, database)
    # Paths compare as text, an open Database or pipeline by identity.
    key = tuple(
        str(part) if isinstance(part, (str, os.PathLike)) else part
        for part in (model, database, adapter, str(device), str(dtype), distilled)
    )
    with _lock:
        kept = _generators.get(key)
        if kept is None or not kept.healthy:
            check_call(prompt, **options)
            kept = _generators[key] = Generator.from_pretrained(
                model, database=database, adapter=adapter, device=device, dtype=dtype, distilled=distilled
            )
    images = kept(prompt, **options).images
    return images[0] if isinstance(prompt, str) and options["num_images_per_prompt"] == 1 else images
