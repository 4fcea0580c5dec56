#include "layers.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "threads.hpp"
#include "vector.hpp"

namespace ragturbo {
namespace {

// x·Φ(x). 1 − Φ(|x|) is e^(−x²/2) times a function that a polynomial in 1 / (1 + 0.225·|x|) meets to 2e-8, by a least
// squares fit of the relative error on [0, 10].
RAGTURBO_INLINE float gelu_of(float x) {
  const float t = 1.0f / (1.0f + 0.225f * std::fabs(x));
  float p = -0.0964478478f;
  p = p * t + 0.398517013f;
  p = p * t - 0.477887303f;
  p = p * t + 0.505929291f;
  p = p * t - 0.161595732f;
  p = p * t + 0.167909890f;
  p = p * t + 0.0716704950f;
  p = p * t + 0.0920282006f;
  p = p * t - 1.24034603e-4f;
  const float tail = p * exp_of(-0.5f * x * x);
  const float y = x * (x < 0.0f ? tail : 1.0f - tail);
  return x - x == 0.0f ? y : (x > 0.0f ? x : x - x);
}

template <typename T>
RAGTURBO_INLINE void geglu_row(const T* x, const float* bias, int64_t width, T* out) {
  const T* gate = x + width;
  if (bias) {
    const float* gate_bias = bias + width;
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i)
      store(out + i, (load(x[i]) + bias[i]) * gelu_of(load(gate[i]) + gate_bias[i]));
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) store(out + i, load(x[i]) * gelu_of(load(gate[i])));
  }
}

RAGTURBO_VECTOR void row(const float* x, const float* bias, int64_t width, float* out) {
  geglu_row(x, bias, width, out);
}
RAGTURBO_VECTOR void row(const bf16* x, const float* bias, int64_t width, bf16* out) {
  geglu_row(x, bias, width, out);
}

template <typename T>
void run(const Geglu& g) {
  const auto* x = static_cast<const T*>(g.x);
  auto* out = static_cast<T*>(g.out);
  const int64_t rows = std::max<int64_t>(1, kSerial / (2 * g.width));  // of a task
  const auto tasks = static_cast<size_t>((g.rows + rows - 1) / rows);
  run_on_torch_threads(tasks, g.threads, [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) * rows;
    for (int64_t r = first; r < std::min(g.rows, first + rows); ++r)
      row(x + r * 2 * g.width, g.bias, g.width, out + r * g.width);
  });
}

}  // namespace

void geglu(const Geglu& request) {
  if (request.rows * request.width == 0) return;
  request.bf16 ? run<bf16>(request) : run<float>(request);
}

void interleave(const Interleave& request) {
  const int64_t h = request.h, w = request.w, bytes = request.bytes;
  const auto* phases = static_cast<const unsigned char*>(request.phases);
  auto* out = static_cast<unsigned char*>(request.out);
  const int64_t row = 2 * w * bytes;
  const int threads = request.batch * 2 * h * row < 4 * kSerial ? 1 : request.threads;
  run_on_torch_threads(static_cast<size_t>(request.batch * 2 * h), threads, [&](size_t task) {
    const int64_t b = static_cast<int64_t>(task) / (2 * h), line = static_cast<int64_t>(task) % (2 * h);
    const int64_t y = line % 2, i = line / 2 + y;
    const unsigned char* from = phases + ((b * (h + 1) + i) * (w + 1) * 4 + 2 * y) * bytes;
    unsigned char* to = out + static_cast<int64_t>(task) * row;
    for (int64_t j = 0; j < w; ++j, to += 2 * bytes) {
      std::memcpy(to, from + j * 4 * bytes, static_cast<size_t>(bytes));
      std::memcpy(to + bytes, from + ((j + 1) * 4 + 1) * bytes, static_cast<size_t>(bytes));
    }
  });
}

}  // namespace ragturbo
