"""Make modules without memory for their weights, which come from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Skeleton(TorchFunctionMode):
    """Within it, new modules are on the meta device and are not initialized.

    `torch.device("meta")` also runs the initialization, on tensors without values: that takes longer than making the
    modules, and its first random number imports a large part of torch.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty or func is torch.zeros:
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)
