// Gather rows from page-locked host memory (or device memory) into device memory, by ids in device memory.
#include <cuda_fp16.h>

#include "cuda.hpp"
#include "cuda_check.hpp"

namespace ragturbo {
namespace {

constexpr int kThreads = 256;
// 16-byte loads in flight per thread: PCIe latency is high, so a block requests 16 KiB before it waits.
constexpr int kLoads = 4;
constexpr int kBlockVectors = kThreads * kLoads;
// The most int8 tokens one block's vectors can touch, with at least 16 channels per token.
constexpr int kMaxScales = kBlockVectors + 1;

__device__ const char* row_or_null(const int64_t* base_at, const int64_t* count_at, int64_t id, int64_t stride) {
  if (id < 0 || id >= *count_at) return nullptr;
  return reinterpret_cast<const char*>(*base_at) + id * stride;
}

// grid: (blocks per row, n). A row is read once: __ldcs marks it for early eviction from the caches.
__global__ void __launch_bounds__(kThreads) gather_fp16(const int64_t* base_at, const int64_t* count_at,
                                                        const int64_t* ids, int64_t stride, int64_t vectors,
                                                        uint4* out) {
  const int64_t i_row = blockIdx.y;
  const auto* row = reinterpret_cast<const uint4*>(row_or_null(base_at, count_at, ids[i_row], stride));
  uint4* o_row = out + i_row * vectors;
  const int64_t first = int64_t{blockIdx.x} * kBlockVectors + threadIdx.x;
  uint4 value[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t v = first + i * kThreads;
    value[i] = row && v < vectors ? __ldcs(row + v) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t v = first + i * kThreads;
    if (v < vectors) o_row[v] = value[i];
  }
}

// Four int8 times a scale, as fp16.
__device__ uint2 dequantise(uint32_t four, float scale) {
  const auto part = [&](int i) { return static_cast<float>(static_cast<int8_t>(four >> (8 * i))) * scale; };
  const __half2 low = __floats2half2_rn(part(0), part(1)), high = __floats2half2_rn(part(2), part(3));
  return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
}

// grid: (blocks per row, n). Each of the row's `vectors` holds 16 int8, stored as two vectors of 8 fp16.
__global__ void __launch_bounds__(kThreads) gather_int8(const int64_t* base_at, const int64_t* count_at,
                                                        const int64_t* ids, int64_t stride, int64_t vectors,
                                                        int token_vectors, uint4* out) {
  __shared__ float s_scale[kMaxScales];
  const int64_t i_row = blockIdx.y;
  const auto* row = reinterpret_cast<const uint4*>(row_or_null(base_at, count_at, ids[i_row], stride));
  uint4* o_row = out + i_row * vectors * 2;
  const int64_t begin = int64_t{blockIdx.x} * kBlockVectors;
  const int64_t end = min(begin + kBlockVectors, vectors);
  uint4 value[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t v = begin + threadIdx.x + i * kThreads;
    value[i] = row && v < end ? __ldcs(row + v) : make_uint4(0, 0, 0, 0);
  }
  // Each scale is read over PCIe once per block, not once per thread.
  const int into_token = static_cast<int>(begin % token_vectors);
  const int tokens = (into_token + static_cast<int>(end - begin) - 1) / token_vectors + 1;
  const auto* scales = reinterpret_cast<const float*>(row + vectors) + begin / token_vectors;
  for (int t = threadIdx.x; t < tokens; t += kThreads) s_scale[t] = row ? __ldcs(scales + t) : 0.0f;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int local = threadIdx.x + i * kThreads;
    const int64_t v = begin + local;
    if (v >= end) break;
    const float scale = s_scale[(into_token + local) / token_vectors];
    const uint2 a = dequantise(value[i].x, scale), b = dequantise(value[i].y, scale);
    const uint2 c = dequantise(value[i].z, scale), d = dequantise(value[i].w, scale);
    o_row[2 * v] = make_uint4(a.x, a.y, b.x, b.y);
    o_row[2 * v + 1] = make_uint4(c.x, c.y, d.x, d.y);
  }
}

}  // namespace

void gather_rows(const Gather& g) {
  at_least(g.n, 0, "n");
  at_least(g.tokens, 1, "tokens");
  at_least(g.channels, 1, "channels");
  const bool packed = g.stored == Stored::int8;
  const int64_t lane = packed ? 16 : 8;
  if (g.channels % lane)
    throw std::invalid_argument("channels=" + std::to_string(g.channels) + " must be a multiple of " +
                                std::to_string(lane));
  if (g.tokens > (int64_t{1} << 40) / g.channels || g.n > 65535)
    throw std::invalid_argument("n=" + std::to_string(g.n) + " rows of " + std::to_string(g.tokens) +
                                " tokens: too large");
  const int64_t payload = packed ? g.tokens * g.channels + g.tokens * 4 : g.tokens * g.channels * 2;
  at_least(g.stride, payload, "stride");
  if (g.stride % 16) throw std::invalid_argument("stride=" + std::to_string(g.stride) + " must be a multiple of 16");
  aligned(g.base_at, 8, "base_at");
  aligned(g.count_at, 8, "count_at");
  if (g.n == 0) return;
  aligned(g.ids, 8, "ids");
  aligned(g.out, 16, "out");
  const int64_t vectors = g.tokens * g.channels / lane;
  const dim3 grid(static_cast<unsigned>((vectors + kBlockVectors - 1) / kBlockVectors), static_cast<unsigned>(g.n));
  auto* out = static_cast<uint4*>(g.out);
  auto* stream = static_cast<cudaStream_t>(g.stream);
  if (packed)
    gather_int8<<<grid, kThreads, 0, stream>>>(g.base_at, g.count_at, g.ids, g.stride, vectors,
                                               static_cast<int>(g.channels / lane), out);
  else
    gather_fp16<<<grid, kThreads, 0, stream>>>(g.base_at, g.count_at, g.ids, g.stride, vectors, out);
  check_cuda(cudaGetLastError(), "gather_rows");
}

}  // namespace ragturbo
