"""The front door: `generate()` for one line of use, `Generator` for a service. Torch loads with the first model."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from ragturbo.config import GeneratorConfig
from ragturbo.errors import InvalidRequest
from ragturbo.output import Neighbor, Output

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    import torch

    from ragturbo.engine.executor import Place
    from ragturbo.engine.database import DatabaseSource
    from ragturbo.model.bundle import Bundle

__all__ = ["Generator", "Neighbor", "Output", "generate"]

log = logging.getLogger("ragturbo")


class Generator:
    """One model, one database, one device thread. Calls from any number of threads; close it, or use it in `with`."""

    def __init__(self, bundle: Bundle, *, database: Any = None, config: GeneratorConfig | None = None) -> None:
        """For a Bundle already in memory; `from_pretrained` loads one."""
        from ragturbo.engine.build import make_engine
        from ragturbo.engine.executor import Executor
        from ragturbo.engine.threads import settle_threads

        self.config = config or GeneratorConfig()
        self._bundle = bundle
        self._engine = make_engine(bundle, self.config)
        self._source: DatabaseSource | None = None
        self._swap = threading.Lock()
        self._executor = Executor(
            self._engine,
            batch_sizes=self.config.batch_sizes,
            batch_window=self.config.batch_window,
            max_queue=self.config.max_queue,
        )
        # The device thread holds the executor, never the Generator: an abandoned Generator is collected and closed.
        self._finalizer = weakref.finalize(self, self._executor.close)
        self._threads = settle_threads(bundle, self._executor.call)
        if database is not None and database is not False:
            self.use_database(database)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "shapes",
        *,
        database: Any = None,
        adapter: str | os.PathLike[str] | bool | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Generator:
        """model: "shapes" (embedded), a local folder or a hub id.

        database: a folder or Database; None takes the bundle's own if it has one; False goes without.
        adapter: a folder with adapter.safetensors [+ decoder_lora]; None takes the bundle's own; False goes without.
        device, dtype: None means cuda/float16 where there is a GPU, else cpu/float32.
        options: the fields of `ragturbo.config.GeneratorConfig` (engine, retriever, vae, attention, compile,
        host_cache, device_cache, batch_sizes, batch_window, max_queue, prompt_cache, log_prompts).
        """
        known = GeneratorConfig.__dataclass_fields__
        if unknown := sorted(set(options) - set(known)):
            raise InvalidRequest(f"unknown option {unknown[0]!r}; there are: {', '.join(known)}")
        config = GeneratorConfig(**options)
        if adapter is True or database is True:
            raise InvalidRequest("adapter and database are a folder, None (the bundle's own) or False (off), not True")
        from ragturbo.engine.build import choose_device
        from ragturbo.engine.executor import refuse_after_fork
        from ragturbo.model.bundle import Bundle

        refuse_after_fork()
        where, precision = choose_device(device, dtype)
        bundle = Bundle.load(
            model,
            device=where,
            dtype=precision,
            vae=config.vae,
            adapter=adapter,
            local_files_only=local_files_only,
            revision=revision,
            cache_dir=cache_dir,
        )
        if database is None:
            database = bundle.database_path
        return cls(bundle, database=database, config=config)

    def __call__(self, prompt: Any = None, **options: Any) -> Output | tuple[Any, ...]:
        """Text to image. Options, each an error where it would have no effect:

        seed: int, or one a prompt or image; num_images_per_prompt uses seed, seed + 1, …; generator, latents: as
        diffusers.
        mode: "adapter", "slerp", "lerp" or "none"; None: adapter if there are an adapter and a database, else none.
        num_neighbors, min_score, query (other text or a key to search by), neighbors (ids, Neighbors or (caption,
        image) pairs); lam: the adapter's strength in place of the cosine; w: the target's weight in slerp and lerp
        (0.8); per: "sample" or "token", for slerp.
        negative_prompt, guidance_scale, num_inference_steps, height, width, prompt_embeds, negative_prompt_embeds:
        as diffusers.
        output_type: "pil", "np", "pt", "latent", "uint8" (B, H, W, 3), "png", "jpeg" or "webp"; postprocess: a hook
        on the uint8 batch; timeout: seconds; place: from `reserve`; return_dict: False gives (images,).
        """
        call = self._start(prompt, options)
        output = call.wait()
        return output if call.request.return_dict else (output.images,)

    def submit(self, prompt: Any = None, **options: Any) -> Future[Output]:
        """As calling it, without waiting. Cancelling the future frees its place in the queue."""
        return self._start(prompt, options).future()

    async def agenerate(self, prompt: Any = None, **options: Any) -> Output:
        """As calling it, for asyncio. Cancelling the task cancels the request; `timeout=` is kept to the moment."""
        import asyncio

        # Tokenising and drawing noise take a while on long lists: not on the loop's thread.
        starting = asyncio.ensure_future(asyncio.to_thread(self._start, prompt, options))
        try:
            call = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # That thread cannot be stopped: what it hands in is taken back.
            starting.add_done_callback(_take_back)
            raise
        return await call.awaited()

    def warmup(self) -> None:
        """Runs every bucket once, so that the first request finds everything loaded, compiled and captured."""
        # A prompt that is remembered takes another way than one that is not.
        times = 2 if self.config.prompt_cache else 1
        # The largest first: the smaller ones' graphs find room in its memory.
        for size in reversed(self.config.batch_sizes):
            for _ in range(times):
                self._start(["warm up"] * size, {"seed": 0, "output_type": "uint8"}, quiet=True).wait()
        self._executor.forget_pace()

    def use_database(self, database: Any) -> None:
        """A Database or its folder, or None to go without. Requests already accepted keep the one they started with."""
        from ragturbo.engine.build import open_source

        source = None if database is None else open_source(database, self._bundle, self.config)
        with self._swap:
            self._source = source

    def load_adapter(self, path: str | os.PathLike[str]) -> None:
        """adapter.safetensors and, where the folder has one, decoder_lora; from the next batch on."""
        self._executor.call(lambda: self._engine.load_adapter(path))

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on the device's thread between two batches, and waits: for profilers."""
        return self._executor.call(function)

    @property
    def healthy(self) -> bool:
        return self._executor.healthy

    def check_room(self, images: int = 1, timeout: float | None = None) -> None:
        """Raises Overloaded, or what else a call would, before anything is spent on it."""
        self._executor.check_room(images, timeout)

    def reserve(self, images: int = 1, timeout: float | None = None) -> Place:
        """As `check_room`, and keeps the room: `with gen.reserve(2, 5.0) as place: gen(…, place=place)` is not
        refused where it asks for no more."""
        return self._executor.reserve(images, timeout)

    def expected_wait(self, images: int = 1) -> float:
        """Seconds until `images` more would be made, by the pace of the last batches; 0 where it is not known yet."""
        return self._executor.expected_wait(images)

    @property
    def database(self) -> Any:
        return None if self._source is None else self._source.live

    @property
    def default_size(self) -> int:
        """The side in pixels of the images the model was made for."""
        return self._bundle.default_size

    @property
    def info(self) -> dict[str, Any]:
        """What is loaded and which ways were chosen."""
        bundle, source = self._bundle, self._source
        return {
            "model": bundle.name,
            "device": str(bundle.device),
            "dtype": str(bundle.dtype).removeprefix("torch."),
            "engine": self._engine.name,
            "ways": self._engine.describe(),
            "distilled": bundle.info.distilled,
            "size": self.default_size,
            "adapter": None if bundle.adapter is None else bundle.adapter.kind,
            "decoder_lora": bundle.has_lora,
            "database": None if source is None else source.info,
            "batch_sizes": list(self.config.batch_sizes),
            "threads": self._threads,
        }

    def stats(self) -> dict[str, Any]:
        """Counters since the start."""
        executor = self._executor
        return {
            "waiting": executor.waiting,
            "running": executor.running,
            **{name: executor.counts[name] for name in COUNTS},
            "batches": dict(sorted(executor.batch_sizes.items())),
            "cache": {} if self._source is None else self._source.counters(),
            "generation": None if self._source is None else self._source.generation,
        }

    def close(self) -> None:
        """Finishes what waits and ends the device's thread. Calling it twice is fine."""
        self._finalizer()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, prompt: Any, options: dict[str, Any], *, quiet: bool = False) -> Any:
        from ragturbo.call import Call

        started = time.perf_counter()
        with self._swap:
            if self._source is not None:
                self._source = self._source.current()
            source = self._source
        quiet = quiet or not self.config.log_prompts
        executor, place = self._executor, options.pop("place", None)
        return Call.start(
            self._bundle, self._engine, executor, source, prompt, options, started, quiet=quiet, place=place
        )


def _take_back(starting: Any) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().cancel()


COUNTS = ("accepted", "finished", "failed", "cancelled", "expired", "rejected", "non_finite")

_lock = threading.Lock()
_generators: dict[tuple[Any, ...], Generator] = {}


def _forget_generators() -> None:
    # After a fork the parent's device threads are not here: the child makes its own.
    global _lock
    _lock = threading.Lock()
    _generators.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_generators)


def generate(
    prompt: Any,
    *,
    model: str | os.PathLike[str] = "shapes",
    database: Any = None,
    adapter: Any = None,
    device: Any = None,
    dtype: Any = None,
    **call_options: Any,
) -> Any:
    """One image for a text, a list for a list. The model is loaded at the first call and kept for the next ones.

    `call_options` are those of `Generator.__call__`.
    """
    # A path names itself; an open Database is its own key.
    named = str(database) if isinstance(database, (str, os.PathLike)) else database
    key = (str(model), named, str(adapter), str(device), str(dtype))
    with _lock:
        generator = _generators.get(key)
        if generator is None or not generator.healthy:
            generator = _generators[key] = Generator.from_pretrained(
                model, database=database, adapter=adapter, device=device, dtype=dtype
            )
    output = generator(prompt, **call_options)
    images = output.images if isinstance(output, Output) else output[0]
    single = isinstance(prompt, str) and call_options.get("num_images_per_prompt", 1) == 1
    return images[0] if single else images


generate.Generator = Generator  # type: ignore[attr-defined]
generate.Output = Output  # type: ignore[attr-defined]
generate.Neighbor = Neighbor  # type: ignore[attr-defined]
