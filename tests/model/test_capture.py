"""Nothing between token ids and the decoder's output synchronizes: it can be captured in a CUDA graph.

FakeTensorMode simulates a GPU and raises if the host needs a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.model.clip_key import ClipKey
from ragturbo.model.inject import MODES, blend_weights, inject
from ragturbo.model.onestep import make_schedule
from ragturbo.model.text import TextEncoder
from ragturbo.model.unet import HSpaceUNet
from ragturbo.model.vae import VAE


@pytest.fixture(scope="module")
def schedule(tiny: ModuleType) -> Any:
    """Made on the host, before the capture."""
    return make_schedule(tiny.scheduler(), 1, distilled=True)


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with FakeTensorMode(), torch.inference_mode():
        yield torch.device("cuda")


def on(device: torch.device, module: Any) -> Any:
    """module.to(device), which fake parameters do not support."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device=device), False)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty_like(value, device=device)
    return module


def test_the_check_can_fail(cuda: torch.device) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.ones(1, device=cuda).item()


@pytest.mark.parametrize("clip", [False, True], ids=["pooled", "clip"])
@pytest.mark.parametrize("end", [2, 5], ids=["legacy-eos", "eos"])
def test_text_states_and_key(tiny: ModuleType, cuda: torch.device, clip: bool, end: int) -> None:
    tokenizer = tiny.clip_tokenizer()
    key = on(cuda, ClipKey(32, 4, 24, 128)) if clip else None
    text = TextEncoder(tokenizer, on(cuda, tiny.text_encoder(tokenizer, eos_token_id=end)), key)
    states = text.encode(torch.zeros(2, 16, dtype=torch.int64, device=cuda))
    assert states.key.device.type == "cuda" and states.key.shape == (2, 24 if clip else 32)


@pytest.mark.parametrize("timestep", ["number", "tensor"])
@pytest.mark.parametrize("mode", MODES)
def test_one_step_with_retrieval(tiny: ModuleType, schedule: Any, cuda: torch.device, mode: str, timestep: str) -> None:
    unet = HSpaceUNet(on(cuda, tiny.unet("sd21")))
    adapter = on(cuda, HSpaceAdapter(64))
    vae = VAE(on(cuda, tiny.vae()))

    def empty(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=cuda)

    x = empty(2, 4, 16, 16) * schedule.init_sigma
    t = 999 if timestep == "number" else torch.full((1,), 999, device=cuda)
    state = unet.encode(schedule.scale_input(x, 0), t, empty(2, 16, 32))
    ids, scores, keys, query = empty(2, 3, dtype=torch.int64), empty(2, 3), empty(2, 3, 32), empty(2, 32)
    cosine = torch.einsum("bd,bkd->bk", query, keys)
    lam, valid = blend_weights(cosine, ids, scores, min_score=empty(2), lam=empty(2))
    # "auto" would select the kernels, which a fake GPU cannot run. Their own tests capture them.
    h = inject(
        mode, state.h, empty(2, 3, 4, 64), lam=lam, valid=valid, w=empty(2), adapter=adapter,
        impl="reference",
    )  # fmt: skip
    image = vae.decode(schedule.step(x, unet.decode(state, h), 0))
    assert image.device.type == "cuda" and image.shape == (2, 3, 128, 128)
    assert unet.retrieval_features(x, empty(2, 16, 32)).shape == (2, 4, 64)
