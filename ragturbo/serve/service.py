"""The Generator behind the endpoint: load, warm up, generate, swap the database, close."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from ragturbo.errors import InvalidRequest
from ragturbo.messages import short
from ragturbo.serve.api_errors import APIError, retry_later
from ragturbo.serve.config import ServeConfig
from ragturbo.serve.metrics import Metrics
from ragturbo.serve.size import parse_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ragturbo.generate import Generator
    from ragturbo.output import Output

log = logging.getLogger("ragturbo")
# Loading takes seconds to minutes.
LOADING_RETRY = 5.0
# Names of ignored fields that are logged. Clients choose the names, so their number has to be limited.
MAX_LOGGED_NAMES = 100
LOAD_ARGUMENTS = ("database", "adapter", "device", "dtype", "local_files_only", "revision", "cache_dir")


class Service:
    """A Generator and its state. If none is given, `load` creates it."""

    def __init__(self, config: ServeConfig, generator: Generator | None = None) -> None:
        self.config = config
        self.generator = generator
        self.created = int(time.time())
        self.warm = False
        self.draining = False
        self.abandoned = False
        """Set if nothing waits for `load` any more: it then closes the Generator it created."""
        self.error: BaseException | None = None
        """Why loading failed."""
        self.metrics = Metrics(lambda: None if self.generator is None else self.generator.stats())
        self._postprocess = config.load_postprocess()
        self._swap_lock = threading.Lock()
        self._logged_names: set[str] = set()
        self._database = config.database if isinstance(config.database, str) else None

    def start_loading(self, on_failure: Callable[[], None] | None = None) -> Future[None]:
        """Run `load` in a daemon thread, which does not delay the end of the process. Sets `error` if it fails."""
        future: Future[None] = Future()
        # A running future cannot be cancelled by its waiter.
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                self.load()
            except BaseException as error:
                self.error = error
                log.error("the model could not be loaded: %s", error)
                if on_failure is not None:
                    on_failure()
            future.set_result(None)

        threading.Thread(target=run, name="ragturbo-load", daemon=True).start()
        return future

    def load(self) -> None:
        """Load the model if needed and warm it up. Blocks until both are done."""
        from ragturbo.generate import Generator

        config = self.config
        begin = time.monotonic()
        created = self.generator is None
        if self.generator is None:
            arguments = {name: getattr(config, name) for name in LOAD_ARGUMENTS}
            if config.distilled is not None:
                arguments["distilled"] = config.distilled
            options = {"log_prompts": config.log_prompts, **config.options}
            self.generator = Generator.from_pretrained(config.model, **arguments, **options)
        loaded = time.monotonic()
        self.generator.warmup()
        if created:
            # A full collection over the objects of torch and the model takes 0.1 s. They all stay, so skip them.
            gc.collect()
            gc.freeze()
        self.warm = True
        if self.abandoned and created:
            self.generator.close()
            return
        log.info("loaded in %.1f s, warmed up in %.1f s", loaded - begin, time.monotonic() - loaded)

    @property
    def alive(self) -> bool:
        """False if only a restart of the process can help."""
        return self.error is None and (self.generator is None or self.generator.healthy)

    @property
    def status(self) -> str:
        if self.error is not None:
            return "failed"
        if self.draining:
            return "draining"
        if not self.alive:
            return "device lost"
        return "ready" if self.warm else "loading"

    def check_room(self) -> None:
        """Raise if not even one image would be accepted now."""
        self.loaded_generator().check_room(1, self.config.timeout)

    def loaded_generator(self) -> Generator:
        """Return the Generator, also while draining. Raises APIError before it is warm."""
        if self.generator is None or not self.warm:
            raise retry_later("the model is being loaded", "loading", LOADING_RETRY)
        return self.generator

    async def generate(
        self, prompt: str, options: dict[str, Any], disconnected: Callable[[], Awaitable[None]]
    ) -> Output:
        """Generate the images of one request. If `disconnected` returns first, cancel it and raise ClientDisconnect."""
        generator, timeout = self.loaded_generator(), self.config.timeout
        if self.config.log_prompts:
            log.info("prompt %r, options %r", prompt, options)
        if self._postprocess is not None:
            options = {**options, "postprocess": self._postprocess}
        # Reserve before tokenising: a refusal costs nothing, and an accepted request is not refused later.
        with generator.reserve(options["num_images_per_prompt"], timeout) as reservation:
            work = asyncio.ensure_future(
                generator.agenerate(prompt, timeout=timeout, reservation=reservation, **options)
            )
            watch = asyncio.ensure_future(disconnected())
            try:
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return work.result()
                raise ClientDisconnect
            finally:
                work.cancel()
                watch.cancel()
                # Both end before the request does; their results are not needed.
                await asyncio.gather(work, watch, return_exceptions=True)

    def size(self, size: str | None) -> tuple[int, int]:
        """Return width and height of an image of this `size`. Raises APIError if this server does not make it."""
        return parse_size(size, **self.sizes())

    def sizes(self) -> dict[str, int]:
        """The sizes this server makes, as arguments of parse_size."""
        generator = self.loaded_generator()
        default = generator.default_size
        return {"step": generator.bundle.vae.factor, "default": default, "most": self.config.max_side or 2 * default}

    def retrieves(self, mode: str | None) -> bool:
        """Whether a request in this mode has neighbours. Raises APIError if the mode cannot be used here."""
        if mode == "none":
            return False
        generator = self.loaded_generator()
        if mode is not None and generator.database is None:
            message = f"mode={mode!r} needs a database, and this server has none; leave 'mode' out"
            raise APIError(400, message, code="invalid_value", param="mode")
        if mode == "adapter" and generator.info["adapter"] is None:
            message = "mode='adapter' needs an adapter, and this server has none; use 'slerp' or leave 'mode' out"
            raise APIError(400, message, code="invalid_value", param="mode")
        return generator.database is not None

    def report_ignored(self, names: list[str]) -> list[str]:
        """Return the notes for a response of a lenient server, and log each name once."""
        for name in map(short, names):
            if name not in self._logged_names and len(self._logged_names) < MAX_LOGGED_NAMES:
                self._logged_names.add(name)
                log.warning("ignoring %s in requests, because this server is lenient", name)
                if len(self._logged_names) == MAX_LOGGED_NAMES:
                    log.warning("further names of ignored fields are not logged")
        return [f"ignored: {', '.join(map(repr, names))}"] if names else []

    def swap(self, path: str | None = None) -> dict[str, Any]:
        """Open a database and use it for new requests; None: reopen the current one.

        If it cannot be opened, the current one stays in use. Requests accepted before keep the one they started with.
        """
        from ragturbo.retrieval import Database

        generator = self.loaded_generator()
        with self._swap_lock:
            try:
                path = path or self._database or _database_path(generator)
                database = Database.open(path)
                generator.use_database(database)
            except BaseException:
                self.metrics.swaps.labels("refused").inc()
                raise
            self._database = path
            self.metrics.swaps.labels("done").inc()
            facts = {"path": path, "generation": database.snapshot.manifest.generation, "pairs": len(database)}
        log.info("now using database %(path)s, generation %(generation)d, %(pairs)d pairs", facts)
        return facts

    def close(self) -> None:
        """Finish accepted requests and close the Generator."""
        if self.generator is not None:
            self.generator.close()


def _database_path(generator: Generator) -> str:
    if generator.database is None:
        raise InvalidRequest("no database is in use; give a path")
    return str(generator.database.path)
