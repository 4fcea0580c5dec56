"""One Generator behind an endpoint: loaded, warmed, watched, swapped and closed."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragturbo.errors import InvalidRequest
from ragturbo.serve.config import ServeConfig
from ragturbo.serve.metrics import Metrics
from ragturbo.serve.problems import Problem, unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ragturbo.generate import Generator
    from ragturbo.output import Output

log = logging.getLogger("ragturbo")
# A model that loads takes seconds to minutes; a client that asks again every few seconds costs nothing.
LOADING_RETRY = 5.0


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Service:
    def __init__(self, config: ServeConfig, generator: Generator | None = None) -> None:
        """generator: one that is loaded already; None: `load` makes it."""
        self.config = config
        self.generator = generator
        self.created = int(time.time())
        self.draining = False
        self.error: BaseException | None = None
        """Why loading failed."""
        self._warm = self._abandoned = False
        self._hook = config.hook()
        self._swapping = threading.Lock()
        self._database = config.database if isinstance(config.database, str) else None
        self.metrics = Metrics(lambda: None if self.generator is None else self.generator.stats())

    def load(self) -> None:
        """Blocks until the first request would find everything loaded, compiled and captured."""
        from ragturbo.generate import Generator

        config = self.config
        begin = time.monotonic()
        ours = False
        if self.generator is None:
            self.generator = Generator.from_pretrained(
                config.model,
                database=config.database,
                adapter=config.adapter,
                device=config.device,
                dtype=config.dtype,
                local_files_only=config.local_files_only,
                revision=config.revision,
                cache_dir=config.cache_dir,
                **{"log_prompts": config.log_prompts, **config.options},
            )
            ours = True
        loaded = time.monotonic()
        self.generator.warmup()
        if ours:
            # A collection that walks through everything torch and the model brought stops the process for a tenth of
            # a second. All of it stays, so it need not be looked at again.
            gc.collect()
            gc.freeze()
        self._warm = True
        if self._abandoned and ours:
            self.generator.close()
            return
        log.info("loaded in %.1f s, warm after %.1f s more", loaded - begin, time.monotonic() - loaded)

    @property
    def alive(self) -> bool:
        """False: nothing but a new process can help."""
        return self.error is None and (self.generator is None or self.generator.healthy)

    @property
    def status(self) -> str:
        if self.error is not None:
            return "failed"
        if self.draining:
            return "draining"
        if self.generator is not None and not self.generator.healthy:
            return "device lost"
        return "ready" if self._warm else "loading"

    @property
    def warm(self) -> bool:
        return self._warm

    def abandon(self) -> None:
        """Nobody waits for `load` any more: what it makes, it closes itself."""
        self._abandoned = True

    def check_room(self) -> None:
        """Raises where not even one image would be taken now, whatever is asked for."""
        self.serving().check_room(1, self.config.timeout)

    def serving(self) -> Generator:
        """The Generator, or the Problem of there being none. While it drains it still serves."""
        if self.generator is None or not self._warm:
            raise unavailable("the model is being loaded", "loading", LOADING_RETRY)
        return self.generator

    async def draw(self, prompt: str, options: dict[str, Any], gone: Callable[[], Awaitable[None]]) -> Output:
        """gone: returns when the client has left, which takes its request out of the queue and raises ClientGone."""
        generator, timeout = self.serving(), self.config.timeout
        self._check_size(generator, options)
        if self.config.log_prompts:
            log.info("prompt %r, options %r", prompt, options)
        if self._hook is not None:
            options = {**options, "postprocess": self._hook}
        # Before anything is tokenised: a refusal must cost nothing, and what was not refused here is not refused later.
        with generator.reserve(options["num_images_per_prompt"], timeout) as place:
            work = asyncio.ensure_future(generator.agenerate(prompt, timeout=timeout, place=place, **options))
            watch = asyncio.ensure_future(gone())
            try:
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return work.result()
                raise ClientGone
            finally:
                work.cancel()
                watch.cancel()
                # Neither may outlive the request, and nobody asks what became of them.
                await asyncio.gather(work, watch, return_exceptions=True)

    def blends(self, mode: str | None) -> bool:
        """Whether a request in this mode has neighbours to name."""
        generator = self.serving()
        if mode is None:
            return generator.database is not None and generator.info["adapter"] is not None
        return mode != "none"

    def _check_size(self, generator: Generator, options: dict[str, Any]) -> None:
        own = generator.default_size
        most = self.config.max_side or 2 * own
        for name in ("width", "height"):
            if options.get(name, own) > most:
                raise Problem(
                    400,
                    f"{name} {options[name]} is more than this server's {most} pixels",
                    code="invalid_value",
                    param="size",
                )

    def swap(self, path: str | None = None) -> dict[str, Any]:
        """Opens a database and puts it in the place of the one in use; None: the one in use, read anew.

        What was accepted before keeps the one it started with. One that cannot be used changes nothing.
        """
        generator = self.serving()
        with self._swapping:
            try:
                path = path or self._database or _own(generator)
                generator.use_database(path)
            except BaseException:
                self.metrics.swaps.labels("refused").inc()
                raise
            self._database = path
            self.metrics.swaps.labels("done").inc()
            database = generator.database
            facts = {"path": str(path), "generation": database.snapshot.manifest.generation, "pairs": len(database)}
        log.info("database %(path)s, generation %(generation)d, %(pairs)d pairs is in use", facts)
        return facts

    def close(self) -> None:
        """Finishes what was accepted."""
        if self.generator is not None:
            self.generator.close()


def _own(generator: Generator) -> str:
    if generator.database is None:
        raise InvalidRequest("no database is in use; name one")
    return str(Path(generator.database.path))
