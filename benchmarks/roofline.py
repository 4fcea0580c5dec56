"""The least bytes and FLOPs of each op, and the floor of its time on a GPU.

Every input is read once and every output written once. The floor is the largest of bytes over memory bandwidth, bytes
over the host link and FLOPs over the matrix peak, without launches. It is a projection, not a measurement.

`python -m benchmarks.roofline --gpu H200` prints the floors of a GPU, `--tflops 989 --bandwidth 4800` those of any GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A GPU's datasheet: dense 16-bit FLOP/s, bytes/s of memory, bytes/s from the host."""

    name: str
    flops: float
    bandwidth: float
    link: float = 32e9


MACHINES = {
    "L40S": Machine("L40S", 362e12, 864e9, 32e9),
    "H100": Machine("H100 SXM", 989e12, 3.35e12, 64e9),
    "H200": Machine("H200", 989e12, 4.8e12, 64e9),
}


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes through device memory, bytes over the host link, and launches of our implementation."""

    flops: float
    memory_bytes: float
    link_bytes: float = 0
    launches: int = 1

    @property
    def bytes(self) -> float:
        return self.memory_bytes + self.link_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.memory_bytes + other.memory_bytes,
            self.link_bytes + other.link_bytes,
            self.launches + other.launches,
        )

    def seconds(self, machine: Machine) -> float:
        """Return the floor on a machine."""
        return max(self.flops / machine.flops, self.memory_bytes / machine.bandwidth, self.link_bytes / machine.link)

    def fraction(self, machine: Machine, measured: float) -> float:
        """Return the floor over a measured time in seconds."""
        return self.seconds(machine) / measured


def slerp(batch: int, tokens: int, channels: int, itemsize: int = 2, per: str = "sample") -> Work:
    """Eq. 3: two features in, one out; 6 FLOPs per element for the inner products, 3 for the blend."""
    n = batch * tokens * channels
    row = channels if per == "token" else tokens * channels
    return Work(9 * n, 3 * n * itemsize + 4 * batch, launches=1 if row <= 8192 else 2)


def scaled_residual(batch: int, tokens: int, channels: int, itemsize: int = 2) -> Work:
    n = batch * tokens * channels
    return Work(2 * n, 3 * n * itemsize + 4 * batch)


def linear(
    rows: int, width: int, inner: int, itemsize: int = 2, *, geglu: bool = False, residual: bool = False
) -> Work:
    """(rows, inner) times (width, inner)ᵀ. GEGLU has twice the weights for the same output."""
    weights = (2 if geglu else 1) * width * inner
    moved = rows * inner + weights + (2 if residual else 1) * rows * width
    return Work(2 * rows * weights, moved * itemsize)


def cross_attention(batch: int, tokens: int, neighbours: int, retrieved: int, channels: int, itemsize: int = 2) -> Work:
    """Eq. 4's core: Q Kᵀ and P V over neighbours · retrieved tokens."""
    keys = neighbours * retrieved
    return Work(4 * batch * tokens * keys * channels, batch * channels * (2 * tokens + 2 * keys) * itemsize)


def attention_adapter(
    batch: int, tokens: int, neighbours: int, retrieved: int, channels: int, itemsize: int = 2
) -> Work:
    """Kind "attention": 3 launches. Intermediate results fit in L2 and are not counted."""
    m, keys = batch * tokens, batch * neighbours * retrieved
    flops = 2 * channels**2 * (2 * m + 2 * keys)
    core = cross_attention(batch, tokens, neighbours, retrieved, channels, itemsize).flops
    moved = 4 * channels**2 + channels + (2 * m + keys) * channels
    return Work(flops + core, moved * itemsize, launches=3)


def transformer_adapter(
    batch: int, tokens: int, neighbours: int, retrieved: int, channels: int, itemsize: int = 2
) -> Work:
    """Kind "transformer", 36M parameters: 14 launches. Intermediate results fit in L2 and are not counted."""
    m, keys = batch * tokens, batch * neighbours * retrieved
    # In units of C²: proj_in, Q, K, V, out, Q, out, proj_out 8; GEGLU 8; its output projection 4.
    flops = 2 * channels**2 * (20 * m + 2 * keys)
    core = cross_attention(batch, tokens, neighbours, retrieved, channels, itemsize).flops
    own = cross_attention(batch, tokens, 1, tokens, channels, itemsize).flops
    moved = transformer_parameters(channels) + (2 * m + keys) * channels
    return Work(flops + core + own, moved * itemsize, launches=14)


def transformer_parameters(channels: int) -> int:
    """Return 36,071,680 at 1280: 22 C² in matrices; biases of 5 layers and the GEGLU's 8 C; 4 norms."""
    return 22 * channels**2 + (5 + 8 + 8) * channels


def group_norm(batch: int, channels: int, pixels: int, itemsize: int = 2, *, add: bool = False) -> Work:
    """GroupNorm and SiLU: one in, one out; with the residual's sum two in, two out. 10 FLOPs per element."""
    n = batch * channels * pixels
    # A program holds a group of 32 in one launch, padded to a power of two.
    lanes = 1 << (max(32, channels // 32) - 1).bit_length()
    launches = 1 if pixels * lanes <= 16384 else 2 if pixels <= 16384 else 3
    return Work(10 * n, (4 if add else 2) * n * itemsize, launches=launches)


def layer_norm(rows: int, channels: int, itemsize: int = 2, *, add: bool = False) -> Work:
    """One in, one out; with the residual's sum two in, two out."""
    n = rows * channels
    return Work((9 if add else 8) * n, (4 if add else 2) * n * itemsize)


def geglu(rows: int, width: int, itemsize: int = 2) -> Work:
    """Values and gates in, product out."""
    return Work(12 * rows * width, (3 * rows * width + 2 * width) * itemsize)


def bias_residual(batch: int, channels: int, pixels: int, itemsize: int = 2) -> Work:
    """Convolution output and residual in, sum with bias out."""
    n = batch * channels * pixels
    return Work(2 * n, (3 * n + channels) * itemsize)


def upsample(batch: int, channels: int, pixels: int, itemsize: int = 2) -> Work:
    """Nearest, by two: every pixel read once and written four times."""
    return Work(0, 5 * batch * channels * pixels * itemsize)


def interleave(batch: int, channels: int, pixels: int, itemsize: int = 2) -> Work:
    """pixels: of the result."""
    return Work(0, 2 * batch * channels * pixels * itemsize)


def softmax(rows: int, length: int, itemsize: int = 2) -> Work:
    """fp32 scores in, probabilities out."""
    return Work(5 * rows * length, rows * length * (4 + itemsize))


def to_uint8(batch: int, pixels: int, itemsize: int = 2) -> Work:
    return Work(4 * batch * 3 * pixels, batch * 3 * pixels * (itemsize + 1))


def gather_rows(rows: int, tokens: int, channels: int, stored: str = "float16", *, host: bool = True) -> Work:
    """Records over the host link, or from device memory, into fp16 rows."""
    values = tokens * channels
    record = 2 * values if stored == "float16" else values + 4 * tokens
    written = 2 * values * rows
    if host:
        return Work(0, written, record * rows)
    return Work(0, written + record * rows)


def topk(keys: int, width: int, queries: int = 1) -> Work:
    """One read of the fp16 keys for all queries."""
    return Work(2.0 * queries * keys * width, 2 * keys * width + 4 * queries * width, launches=2)


def main_shapes() -> dict[str, Work]:
    """Return the work of each op for SD 2.1 at 512², fp16, batch 1, one neighbour, 630,000 keys of 1024."""
    return {
        "slerp, per sample": slerp(1, 64, 1280),
        "slerp, per token": slerp(1, 64, 1280, per="token"),
        "scaled_residual": scaled_residual(1, 64, 1280),
        "cross_attention, k 1": cross_attention(1, 64, 1, 64, 1280),
        "cross_attention, k 16": cross_attention(1, 64, 16, 64, 1280),
        "adapter, attention, k 1": attention_adapter(1, 64, 1, 64, 1280),
        "adapter, transformer, k 1": transformer_adapter(1, 64, 1, 64, 1280),
        "adapter, transformer, k 1, batch 8": transformer_adapter(8, 64, 1, 64, 1280),
        "group_norm, UNet 320×64²": group_norm(1, 320, 64 * 64),
        "group_norm, UNet 1280×8²": group_norm(1, 1280, 8 * 8),
        "group_norm, VAE 512×64²": group_norm(1, 512, 64 * 64),
        "group_norm, VAE 128×512²": group_norm(1, 128, 512 * 512),
        "layer_norm, 4096×320": layer_norm(4096, 320),
        "geglu, 4096×1280": geglu(4096, 1280),
        "bias_residual, VAE 128×512²": bias_residual(1, 128, 512 * 512),
        "upsample, VAE 256×256²": upsample(1, 256, 256 * 256),
        "interleave, VAE 256×512²": interleave(1, 256, 512 * 512),
        "softmax, VAE 4096×4096": softmax(4096, 4096),
        "to_uint8, 512²": to_uint8(1, 512 * 512),
        "gather_rows, 1 of fp16, host": gather_rows(1, 64, 1280),
        "gather_rows, 16 of fp16, host": gather_rows(16, 64, 1280),
        "gather_rows, 16 of int8, host": gather_rows(16, 64, 1280, "int8"),
        "gather_rows, 16 of fp16, device": gather_rows(16, 64, 1280, host=False),
        "topk, 630,000 × 1024": topk(630_000, 1024),
    }


def table(machines: Sequence[Machine]) -> str:
    """Return Markdown with launches, bytes, FLOPs and floors of each op at its main shape."""
    heads = ["op", "launches", "MB", "GFLOP", *(f"{machine.name}, µs" for machine in machines)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, work in main_shapes().items():
        moved = work.bytes / 1e6
        floors = (f"{work.seconds(machine) * 1e6:.3g}" for machine in machines)
        lines.append(f"| {name} | {work.launches} | {moved:.3g} | {work.flops / 1e9:.3g} | {' | '.join(floors)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", nargs="+", choices=sorted(MACHINES), default=sorted(MACHINES))
    parser.add_argument("--tflops", type=float, help="of another GPU: dense 16-bit TFLOP/s")
    parser.add_argument("--bandwidth", type=float, help="of another GPU: memory bandwidth in GB/s")
    parser.add_argument("--link", type=float, default=32, help="of another GPU: host link in GB/s, one way")
    options = parser.parse_args(argv)
    if (options.tflops is None) != (options.bandwidth is None):
        parser.error("--tflops and --bandwidth have to be given together")
    if options.tflops is not None:
        machines = [Machine("this GPU", options.tflops * 1e12, options.bandwidth * 1e9, options.link * 1e9)]
    else:
        machines = [MACHINES[name] for name in options.gpu]
    sys.stdout.write(table(machines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
