#pragma once
#include <cstdint>

namespace ragturbo {

// value · gelu(gate) on a CPU, with the exact gelu and the bias of the projection before it.
struct Geglu {
  const void* x;  // (rows, 2·width): values, then gates; fp32 or bf16
  void* out;      // (rows, width), as x
  bool bf16;
  int64_t rows, width;
  const float* bias;  // (2·width) or null
  int threads;
};
void geglu(const Geglu& request);

// ops/interleave.py in channels_last memory: (batch, h + 1, w + 1, 4, bytes) -> (batch, 2h, 2w, bytes).
struct Interleave {
  const void* phases;
  void* out;
  int64_t batch, h, w;
  int64_t bytes;  // of a pixel's channels
  int threads;
};
void interleave(const Interleave& request);

}  // namespace ragturbo
