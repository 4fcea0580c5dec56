"""Kernels are compared with fp64, within the error of the same-dtype torch composition. Memory is poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def interpreted_or_on_a_gpu() -> None:
    from ragturbo.ops import dispatch

    if DEVICE == "cpu" and dispatch.HAS_TRITON and not dispatch.INTERPRET:
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set: see tests/conftest.py")
    if DEVICE == "cpu" and dispatch.HAS_TRITON:
        # Before 3.7 the interpreter uses one-element arrays as loop bounds, which NumPy rejects since 2.4.
        old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
        if old and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
            pytest.skip("this triton's interpreter needs numpy < 2.4, or triton ≥ 3.7: the kernels cannot be run here")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill the memory of torch.empty with NaN (integers: the maximum), so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture
def randn(rng) -> Callable[..., Tensor]:
    """randn(shape, dtype) on the test's device, seeded by the run's seed."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    return make


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """no_worse(out, exact, eager): the error of out is at most twice eager's, in 2-norm and in maximum norm.

    Plus one rounding, which a lucky eager result may not show: for 16-bit types a third of an eps on average; for fp32,
    where eager's whole error is a few roundings and is sometimes near zero, a whole eps; twice that if there are fewer
    than 32 numbers. Several eager results (the same sums in other orders) count by the greatest error.

    terms: the norm of the summands, if the sum itself may cancel.
    chained: number of consecutively rounded sums.
    """

    def check(out: Tensor, exact: Tensor, *eager: Tensor, terms: Tensor | None = None, chained: int = 1) -> None:
        assert all(out.shape == x.shape for x in (exact, *eager)) and all(out.dtype == x.dtype for x in eager)
        assert exact.dtype == torch.float64
        assert out.isfinite().all()
        eps = torch.finfo(out.dtype).eps
        error, eager_errors = out.double() - exact, [x.double() - exact for x in eager]
        scale = exact.norm() if terms is None else terms.double()
        rounding = 2 * eps if out.numel() < 32 else eps if out.dtype == torch.float32 else eps / 3
        eager_norm, eager_worst = max(e.norm() for e in eager_errors), max(e.abs().max() for e in eager_errors)
        assert error.norm() <= 2 * eager_norm + chained * rounding * scale, f"{error.norm() / scale:.2e} relative"
        worst, greatest = error.abs().max(), exact.abs().max() if terms is None else scale
        assert worst <= 2 * eager_worst + 3 * chained * rounding * greatest, f"{worst:.2e} at worst"

    return check
