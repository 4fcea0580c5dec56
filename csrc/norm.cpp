#include "norm.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "threads.hpp"
#include "vector.hpp"

namespace ragturbo {
namespace {

// Pixels of a task, and those summed in fp32 before fp64 takes over: few enough that their roundings do not show, many
// enough that the fp64 part costs little.
constexpr int64_t kRows = 128, kShort = 8;
// Sums of x − pivot and of its square over `rows` pixels, for each channel. The pivot is the middle one of three pixels:
// without it, the square of a mean far from zero would cancel the variance.
template <typename T>
RAGTURBO_INLINE void sums_of(const T* x, const float* pivot, int64_t rows, int64_t channels, double* sum,
                             double* square) {
  // Channels that stay in registers while the pixels pass.
  constexpr int64_t kWide = 64;
  for (int64_t first = 0; first < channels; first += kWide) {
    const int64_t n = std::min(kWide, channels - first);
    double total[kWide] = {}, squares[kWide] = {};
    for (int64_t r = 0; r < rows; r += kShort) {
      float part[kWide] = {}, part_squares[kWide] = {};
      for (int64_t i = r; i < std::min(rows, r + kShort); ++i) {
        const T* at = x + i * channels + first;
#pragma GCC ivdep
        for (int64_t c = 0; c < n; ++c) {
          const float d = load(at[c]) - pivot[first + c];
          part[c] += d;
          part_squares[c] += d * d;
        }
      }
      for (int64_t c = 0; c < n; ++c) {
        total[c] += static_cast<double>(part[c]);
        squares[c] += static_cast<double>(part_squares[c]);
      }
    }
    std::copy(total, total + n, sum + first);
    std::copy(squares, squares + n, square + first);
  }
}

template <typename T>
RAGTURBO_INLINE void apply_to(const T* x, const float* scale, const float* shift, int64_t rows, int64_t channels,
                              bool silu, T* out) {
  for (int64_t r = 0; r < rows; ++r, x += channels, out += channels) {
    if (silu) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) store(out + c, silu_of(load(x[c]) * scale[c] + shift[c]));
    } else {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) store(out + c, load(x[c]) * scale[c] + shift[c]);
    }
  }
}

RAGTURBO_VECTOR void sums(const float* x, const float* p, int64_t rows, int64_t c, double* sum, double* square) {
  sums_of(x, p, rows, c, sum, square);
}
RAGTURBO_VECTOR void sums(const bf16* x, const float* p, int64_t rows, int64_t c, double* sum, double* square) {
  sums_of(x, p, rows, c, sum, square);
}
RAGTURBO_VECTOR void apply(const float* x, const float* a, const float* b, int64_t rows, int64_t c, bool silu,
                           float* out) {
  apply_to(x, a, b, rows, c, silu, out);
}
RAGTURBO_VECTOR void apply(const bf16* x, const float* a, const float* b, int64_t rows, int64_t c, bool silu,
                           bf16* out) {
  apply_to(x, a, b, rows, c, silu, out);
}

// The affine form of the norm per channel, from the blocks' sums.
void coefficients(const GroupNorm& g, const float* pivot, const double* blocks, int64_t count, float* scale,
                  float* shift) {
  const int64_t channels = g.channels, width = channels / g.groups;
  std::vector<double> sum(channels), square(channels);
  for (int64_t i = 0; i < count; ++i, blocks += 2 * channels)
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += blocks[c];
      square[c] += blocks[channels + c];
    }
  const auto n = static_cast<double>(g.pixels);
  for (int64_t first = 0; first < channels; first += width) {
    const auto mean_of = [&](int64_t c) { return pivot[c] + sum[c] / n + (g.add_bias ? g.add_bias[c] : 0.0f); };
    double mean = 0, variance = 0;
    for (int64_t c = first; c < first + width; ++c) mean += mean_of(c);
    mean /= static_cast<double>(width);
    for (int64_t c = first; c < first + width; ++c) {
      const double own = sum[c] / n, apart = mean_of(c) - mean;
      // Rounding can make the first part negative. A NaN must stay one, which std::max(0, NaN) would not.
      const double within = square[c] / n - own * own;
      variance += (within < 0 ? 0.0 : within) + apart * apart;
    }
    const double rstd = 1.0 / std::sqrt(variance / static_cast<double>(width) + static_cast<double>(g.eps));
    for (int64_t c = first; c < first + width; ++c) {
      scale[c] = static_cast<float>(rstd * g.weight[c]);
      shift[c] = static_cast<float>(((g.add_bias ? g.add_bias[c] : 0.0f) - mean) * rstd * g.weight[c] + g.bias[c]);
    }
  }
}

template <typename T>
void run(const GroupNorm& g) {
  const int64_t channels = g.channels, blocks = (g.pixels + kRows - 1) / kRows, image = g.pixels * channels;
  const int threads = g.batch * image < kSerial ? 1 : g.threads;
  const auto* x = static_cast<const T*>(g.x);
  auto* out = static_cast<T*>(g.out);
  const auto tasks = static_cast<size_t>(g.batch * blocks);
  std::vector<float> pivots(g.batch * channels), affine(g.batch * 2 * channels);
  std::vector<double> partial(tasks * 2 * channels);
  for (int64_t b = 0; b < g.batch; ++b)
    for (int64_t c = 0; c < channels; ++c) {
      const auto pixel = [&](int64_t i) { return load(x[b * image + i * channels + c]); };
      const float first = pixel(0), half = pixel(g.pixels / 2), last = pixel(g.pixels - 1);
      const float middle = std::max(std::min(first, half), std::min(std::max(first, half), last));
      pivots[b * channels + c] = std::isfinite(middle) ? middle : 0.0f;
    }
  const auto rows_of = [&](int64_t block) { return std::min(kRows, g.pixels - block * kRows); };
  run_on_torch_threads(tasks, threads, [&](size_t i) {
    const int64_t b = static_cast<int64_t>(i) / blocks, block = static_cast<int64_t>(i) % blocks;
    double* sum = &partial[i * 2 * channels];
    sums(x + b * image + block * kRows * channels, &pivots[b * channels], rows_of(block), channels, sum,
         sum + channels);
  });
  for (int64_t b = 0; b < g.batch; ++b) {
    float* scale = &affine[b * 2 * channels];
    coefficients(g, &pivots[b * channels], &partial[b * blocks * 2 * channels], blocks, scale, scale + channels);
  }
  // Backwards, so that what the sums read last is still in the cache.
  run_on_torch_threads(tasks, threads, [&](size_t i) {
    i = tasks - 1 - i;
    const int64_t b = static_cast<int64_t>(i) / blocks, block = static_cast<int64_t>(i) % blocks;
    const int64_t at = b * image + block * kRows * channels;
    const float* scale = &affine[b * 2 * channels];
    apply(x + at, scale, scale + channels, rows_of(block), channels, g.silu, out + at);
  });
}

}  // namespace

void group_norm(const GroupNorm& request) {
  if (request.batch * request.pixels * request.channels == 0) return;
  request.bf16 ? run<bf16>(request) : run<float>(request);
}

}  // namespace ragturbo
