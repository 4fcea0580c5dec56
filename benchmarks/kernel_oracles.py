"""The expected results of `benchmarks.kernel_cases`: each op's plain torch reference in fp64 on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ragturbo.kernels import cross_attention as attention_kernels
from ragturbo.ops.bias_residual import reference as bias_residual
from ragturbo.ops.cross_attention import reference as cross_attention
from ragturbo.ops.geglu import reference as geglu
from ragturbo.ops.group_norm import reference as group_norm
from ragturbo.ops.interleave import reference as interleave
from ragturbo.ops.layer_norm import reference as layer_norm
from ragturbo.ops.layer_norm import reference_and_sum as layer_norm_and_sum
from ragturbo.ops.linear import reference as linear
from ragturbo.ops.project_attention import reference as project_attention
from ragturbo.ops.scaled_residual import reference as scaled_residual
from ragturbo.ops.slerp import reference as slerp
from ragturbo.ops.softmax import reference as softmax
from ragturbo.ops.to_uint8 import reference as to_uint8
from ragturbo.ops.upsample import reference as upsample

# Maximum relative error in the 2-norm: three roundings to the storage type, or fp32 sums of 5,120 terms.
WITHIN = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
Tensors = tuple[Tensor, ...]


def _group_norm(*arguments: Any) -> Tensors:
    *inputs, keep_sum = arguments
    out = group_norm(*inputs)
    return out if keep_sum else out[:1]


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Any, add_bias: Any) -> Tensors:
    if add is None:
        return (layer_norm(x, weight, bias, eps),)
    return layer_norm_and_sum(x, weight, bias, eps, add, add_bias)


# op -> function from the launcher's arguments in fp64 to the results.
FORWARD: dict[str, Callable[..., Tensors]] = {
    "slerp": lambda t, r, w, token, *guards: (slerp(t, r, w, "token" if token else "sample"),),
    "scaled_residual": lambda *a: (scaled_residual(*a),),
    "linear": lambda *a: (linear(*a),),
    "cross_attention": lambda *a: (cross_attention(*a),),
    "project_attention": lambda *a: (project_attention(*a),),
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "geglu": lambda *a: (geglu(*a),),
    "bias_residual": lambda *a: (bias_residual(*a),),
    "upsample": lambda *a: (upsample(*a),),
    "interleave": lambda *a: (interleave(*a),),
    "softmax": lambda scores, scale, dtype: (softmax(scores, scale, torch.float64),),
}


def compare(op: str, call: Any) -> dict[str, float]:
    """Run a case once and compare it with fp64.

    Returns:
        "relative_error", the largest of its results', and "control", the error of the reversed result, which has to be
        too large.
    """
    found: Tensors
    exact: Tensors
    if op == "to_uint8":
        # The bytes have to be equal.
        found, exact = (call(),), (to_uint8(*call.args),)
    elif op.endswith(" backward"):
        found, exact = _backward(op, call)
    else:
        out = call()
        exact = FORWARD[op](*map(_double, call.args))
        found = (out if isinstance(out, tuple) else (out,))[: len(exact)]
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    # The largest result, because a gradient of one number per sample hardly changes when reversed.
    a, b = max(pairs, key=lambda pair: pair[0].numel())
    control = float((a.flatten().flip(0) - b.flatten()).norm() / b.norm())
    # `max` would not return a NaN.
    return {"relative_error": next((e for e in errors if e != e), max(errors)), "control": control}


@torch.enable_grad()
def _backward(op: str, call: Any) -> tuple[Tensors, Tensors]:
    if op == "cross_attention backward":
        g, q, k, v, valid, _, _, heads = call.args
        # The case's `out` and `softmax` are placeholders.
        found = call.func(g, q, k, v, valid, *attention_kernels.forward(q, k, v, valid, heads), heads)
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        result = cross_attention(leaves[0], leaves[1], leaves[2], valid, heads)
    elif op == "scaled_residual backward":
        g, delta, lam = call.args
        found = call()
        leaves = [x.double().requires_grad_() for x in (delta, lam)]
        result = scaled_residual(torch.zeros_like(g, dtype=torch.float64), *leaves)
    else:
        g, t, r, w, token, *_ = call.args
        found = call()
        leaves = [x.double().requires_grad_() for x in (t, r, w)]
        result = slerp(leaves[0], leaves[1], leaves[2], "token" if token else "sample")
    return found, torch.autograd.grad(result, leaves, g.double())


def _double(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_double(x) for x in argument]
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
