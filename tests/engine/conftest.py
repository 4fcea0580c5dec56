"""A small real model with an adapter that has an effect, a database built with it, and engines over both."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ragturbo.config import GeneratorConfig
from ragturbo.engine.database import DatabaseGeneration
from ragturbo.engine.graph_engine import GraphEngine
from ragturbo.engine.recorder import Uncaptured
from ragturbo.engine.reference import ReferenceEngine
from ragturbo.engine.request import Request
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.bundle import Bundle
from ragturbo.ops import dispatch
from ragturbo.retrieval import Database, Geometry, Record

sys.path.insert(0, str(Path(__file__).parent))

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "cat", "dog")
CAPTIONS = [f"a {c} {s}" for c in COLOURS for s in SHAPES]


@pytest.fixture(scope="session")
def model_folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.make_bundle(tmp_path_factory.mktemp("engine") / "model")
    with torch.random.fork_rng(devices=[]):
        save_adapter(folder, seed=0)
    return folder


def save_adapter(folder: Path, seed: int, phrases: int = 3) -> None:
    """An adapter with an output projection that is not zero: a neighbour's id must change the image."""
    torch.manual_seed(seed)
    adapter = HSpaceAdapter(64, phrases=phrases)
    torch.nn.init.normal_(adapter.proj_out.weight, std=0.3)
    if adapter.phrase is not None:
        torch.nn.init.normal_(adapter.phrase)
    adapter.save(folder)


@pytest.fixture
def new_adapter() -> Callable[..., None]:
    return save_adapter


@pytest.fixture
def decoder_lora(model_folder: Path) -> Callable[[Path, int], None]:
    """Writes a decoder_lora folder (and the adapter beside it) with weights that are not zero."""

    def write(folder: Path, seed: int) -> None:
        import peft

        from ragturbo.model import lora

        unet = Bundle.load(model_folder, device="cpu").unet.unet
        config = peft.LoraConfig(r=4, target_modules=r"up_blocks\..*(to_q|to_k|to_out\.0)")
        peft.inject_adapter_in_model(config, unet, adapter_name=lora.NAME)
        unet.peft_config = {lora.NAME: config}
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        lora.save_lora(unet, folder / lora.FOLDER)
        save_adapter(folder, seed=0)

    return write


@pytest.fixture(scope="session")
def bundle(model_folder: Path) -> Bundle:
    """Shared: a test that changes weights loads its own."""
    return Bundle.load(model_folder, device="cpu")


@pytest.fixture(scope="session")
def write_database(bundle: Bundle) -> Callable[..., Database]:
    """Keys are the captions' own; features are noise of the features' size, one seed a pair."""

    def write(path: Path, captions: list[str] = CAPTIONS, seed: int = 0, dtype: str = "float16") -> Database:
        with torch.inference_mode():
            keys = bundle.text.encode(bundle.text.tokenize(captions).input_ids).key.numpy()
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(len(captions), 4, 64)).astype(np.float32)
        records = [Record(i, caption) for i, caption in enumerate(captions)]
        geometry = Geometry(2, 2, 64, dtype, keys.shape[1])
        if dtype == "float16":
            rows = rows.astype(np.float16)
        return Database.write(path, [(records, keys, rows)], geometry=geometry, encoder=bundle.fingerprint())

    return write


@pytest.fixture(scope="session")
def database_folder(write_database: Callable[..., Database], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine-db") / "db"
    write_database(path)
    return path


@pytest.fixture
def database(database_folder: Path) -> Database:
    return Database.open(database_folder)


@pytest.fixture
def source(database: Database) -> DatabaseGeneration:
    return DatabaseGeneration(database)


@pytest.fixture
def reference(bundle: Bundle) -> ReferenceEngine:
    return ReferenceEngine(bundle)


@pytest.fixture
def graph_engine(bundle: Bundle) -> Callable[..., GraphEngine]:
    """The graph engine with its steps called instead of replayed: everything except the capture itself."""

    def make(of: Bundle = bundle, **options: object) -> GraphEngine:
        return GraphEngine(of, GeneratorConfig(**options), Uncaptured())  # type: ignore[arg-type]

    return make


@pytest.fixture
def replayed_engine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., GraphEngine]:
    """The graph engine over recordings that replay their operations and run no Python, as a CUDA graph does."""
    import replay

    # A recording sees torch's operations only, so the engines it is compared with run nothing else.
    monkeypatch.setattr(dispatch, "FORCED", {"": "reference"})
    monkeypatch.setenv("RAGTURBO_IMPL", "reference")

    def make(of: Bundle = bundle, **options: object) -> GraphEngine:
        return GraphEngine(of, GeneratorConfig(**options), replay.Replayed(monkeypatch))  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_composed(bundle: Bundle) -> Callable[..., Request]:
    """Requests that search by phrase, as a Generator makes them."""

    def make(prompts: list[str], source: DatabaseGeneration, seed: int = 0, **options: Any) -> Request:
        return Request.make(bundle, source, prompts, encode_pairs=None, started=time.perf_counter(), seed=seed,
                            output_type="latent", **{"compose": True} | options)  # fmt: skip

    return make


@pytest.fixture
def make_request(bundle: Bundle) -> Callable[..., Request]:
    def make(*prompts: str, seed: int = 0, **fields: object) -> Request:
        n = len(prompts)
        rows = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]
        values = {
            "latents": torch.cat(rows),
            "lam": torch.full((n,), float("nan")),
            "w": torch.full((n,), 0.8),
            "min_score": torch.full((n,), -float("inf")),
            "input_ids": bundle.text.tokenize(list(prompts)).input_ids,
            "texts": tuple((prompt,) for prompt in prompts),
            "seeds": tuple(range(seed, seed + n)),
            "output_type": "latent",
        }
        return Request(**(values | fields))  # type: ignore[arg-type]

    return make
