"""Count the FLOPs by dtype, bytes, launches and allocations of each stage, without a GPU.

The modules run under FakeTensorMode as if on a CUDA device: shapes and dtypes are propagated, nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ragturbo.bench.models import CONFIGS, modules
from ragturbo.model.unet import HSpaceUNet
from ragturbo.model.vae import VAE


@dataclass
class Counts:
    """
    Args:
        flops: of matrix products, convolutions and attention, by dtype.
        eager_bytes: read and written by the eager ops.
        least_bytes: every input read once and every result written once.
        launches: ops that start at least one kernel; views and empty allocations do not.
        allocations: tensors with memory of their own.
    """

    flops: dict[str, int] = field(default_factory=dict)
    eager_bytes: int = 0
    least_bytes: int = 0
    launches: int = 0
    allocations: int = 0

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._inside: set[int] = set()
        self._outside: dict[int, int] = {}
        # Storages are identified by address, so they have to outlive the count.
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        works = launches(func, made)
        for tensor in given if works else ():
            self._see(tensor)
        for tensor in made:
            if tensor.untyped_storage()._cdata not in storages:
                self._own(tensor)
        if not works:
            return out
        packet = func._overloadpacket
        flops = int(flop_registry[packet](*args, **(kwargs or {}), out_val=out)) if packet in flop_registry else 0
        self.add(given, made, flops)
        return out

    def add(self, given: list[torch.Tensor], made: list[torch.Tensor], flops: int) -> None:
        counts = self.counts
        counts.launches += 1
        counts.eager_bytes += sum(_nbytes(t) for t in given) + sum(_nbytes(t) for t in made)
        if flops:
            name = str(given[0].dtype).removeprefix("torch.")
            counts.flops[name] = counts.flops.get(name, 0) + flops

    def attention(self, given: list[torch.Tensor], out: torch.Tensor, flops: int) -> None:
        """Count one fused kernel."""
        for tensor in given:
            self._see(tensor)
        self._own(out)
        self.add(given, [out], flops)

    def _own(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        self.counts.allocations += storage._cdata not in self._inside
        self._inside.add(storage._cdata)

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._inside and storage._cdata not in self._outside:
            self._kept.append(storage)
            self._outside[storage._cdata] = _nbytes(tensor)

    def finish(self, out: Any) -> Counts:
        results = sum(_nbytes(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.counts.least_bytes = sum(self._outside.values()) + results
        return self.counts


class _FusedAttention(TorchFunctionMode):
    """Count attention as one kernel: without a CUDA driver torch decomposes it into products and a softmax."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3] if len(args) >= 3 else (*args, *((kwargs or {})[n] for n in ("query", "key", "value")))[:3]
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        # Two products, two FLOPs per multiply-add.
        flops = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self._counter.attention([q, k, v], out, flops)
        return out


_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "_unsafe_view", "_reshape_alias")


def launches(func: Any, made: list[torch.Tensor]) -> bool:
    """Return whether an op starts a kernel: it is neither a view nor an empty allocation."""
    name = func._schema.name.split("::")[-1]
    return bool(made) and not func.is_view and name not in _FREE


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count(call: Callable[[], Any]) -> Counts:
    """Count one call. Its tensors may be fake, but not inference tensors.

    Inference mode is off, because in it linear and conv2d are dispatched as ops that torch's FLOP registry lacks.
    """
    with torch.inference_mode(False), torch.no_grad(), _Counter() as counter, _FusedAttention(counter):
        out = call()
    return counter.finish(out)


@lru_cache(maxsize=16)
def stage_counts(config: str, dtype: torch.dtype = torch.float16, batch: int = 1, neighbors: int = 1,
                 vae_dtype: torch.dtype | None = None) -> dict[str, Counts]:  # fmt: skip
    """Return the counts of each stage for a configuration of `ragturbo.bench.models`."""
    length = CONFIGS[config]["text"]["max_position_embeddings"]
    out: dict[str, Counts] = {}
    # Modules created in inference mode would have inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        parts = modules(config, {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        for name, module in parts.items():
            precision = vae_dtype if name == "vae" and vae_dtype else dtype
            _as_if_on_cuda(module.eval(), precision)
        unet, vae, adapter = HSpaceUNet(parts["unet"]), VAE(parts["vae"]), parts["adapter"]
        options = unet.unet.config
        text = torch.empty((batch, length, options.cross_attention_dim), dtype=dtype)
        latents = torch.empty((batch, vae.channels, options.sample_size, options.sample_size), dtype=dtype)
        timestep = torch.empty((batch,))
        ids = torch.empty((batch, length), dtype=torch.int64)
        out["text"] = count(lambda: parts["text"](input_ids=ids).last_hidden_state)
        conditions: dict[str, Any] = {}
        if width := options.time_cond_proj_dim:
            conditions["timestep_cond"] = torch.empty((batch, width), dtype=dtype)
        out["encode"] = count(lambda: unet.encode(latents, timestep, text, **conditions))
        state = unet.encode(latents, timestep, text, **conditions)
        h_tgt = state.h.flatten(2).transpose(1, 2)
        h_retr = torch.empty((batch, neighbors, *h_tgt.shape[1:]), dtype=dtype)
        lam, valid = torch.empty((batch,)), torch.empty((batch, neighbors), dtype=torch.bool)
        out["adapter"] = count(lambda: adapter(h_tgt, h_retr, lam, valid, impl="sdpa"))
        out["decode"] = count(lambda: unet.decode(state))
        out["vae"] = count(lambda: vae.decode(latents))
    return out


def _as_if_on_cuda(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Do what nn.Module.to does, which fails for fake parameters."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                part._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
