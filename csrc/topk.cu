// Exact search with one read of the keys. Each warp keeps its best k in registers ("warp select").
#include <cuda_fp16.h>

#include <limits>

#include "cuda.hpp"
#include "cuda_check.hpp"

namespace ragturbo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 2;
// Keys a warp reads at once: enough loads in flight to hide memory latency, and one read of the query for all.
constexpr int kRows = 4;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kNoRow = std::numeric_limits<int>::max();

struct Candidate {
  float score;
  int row;
};

__device__ bool better(Candidate a, Candidate b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

// The best 32 candidates of a warp, best first, one per lane.
struct WarpBest {
  Candidate mine;
  // The k-th best so far: a new candidate must be better. The same in every lane.
  Candidate bar;
  int k;

  __device__ void start(int wanted) {
    k = wanted;
    mine = bar = {-INFINITY, kNoRow};
  }

  // `candidate` is the same in every lane. NaN is never better than `bar`.
  __device__ void offer(Candidate candidate) {
    if (!better(candidate, bar)) return;
    const int lane = threadIdx.x & 31;
    const int place = __popc(__ballot_sync(kAll, better(mine, candidate)));
    const Candidate left = {__shfl_up_sync(kAll, mine.score, 1), __shfl_up_sync(kAll, mine.row, 1)};
    if (lane > place) mine = left;
    if (lane == place) mine = candidate;
    bar = {__shfl_sync(kAll, mine.score, k - 1), __shfl_sync(kAll, mine.row, k - 1)};
  }

  // Each lane has its own candidate.
  __device__ void offer_each(Candidate theirs) {
    unsigned lanes = __ballot_sync(kAll, better(theirs, bar));
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __ffs(lanes) - 1;
      offer({__shfl_sync(kAll, theirs.score, lane), __shfl_sync(kAll, theirs.row, lane)});
    }
  }
};

// Merge the lists of all warps into warp 0's.
__device__ void merge_block(WarpBest& best, Candidate (*s_lists)[32]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  __syncthreads();
  s_lists[warp][lane] = best.mine;
  __syncthreads();
  if (warp) return;
  for (int w = 1; w < kWarps; ++w)
    best.offer_each(lane < best.k ? s_lists[w][lane] : Candidate{-INFINITY, kNoRow});
}

__device__ float dot8(uint4 key, const float* query, float sum) {
  const auto* pair = reinterpret_cast<const __half2*>(&key);
  const float4 low = reinterpret_cast<const float4*>(query)[0], high = reinterpret_cast<const float4*>(query)[1];
  const float2 a = __half22float2(pair[0]), b = __half22float2(pair[1]);
  const float2 c = __half22float2(pair[2]), d = __half22float2(pair[3]);
  sum = fmaf(a.x, low.x, fmaf(a.y, low.y, fmaf(b.x, low.z, fmaf(b.y, low.w, sum))));
  return fmaf(c.x, high.x, fmaf(c.y, high.y, fmaf(d.x, high.z, fmaf(d.y, high.w, sum))));
}

// Each block writes its best k of every query to `found` (blocks, queries, k). Shared memory: Q queries, fp32.
template <int Q>
__global__ void __launch_bounds__(kThreads, Q == 4 ? 1 : kBlocksPerSm)
    scan_keys(const int64_t* base_at, const int64_t* count_at, const float* query, int queries, int dim, int k,
              Candidate* found) {
  extern __shared__ float4 s_raw[];
  auto* s_query = reinterpret_cast<float*>(s_raw);
  __shared__ Candidate s_lists[kWarps][32];
  for (int i = threadIdx.x; i < Q * dim; i += kThreads) s_query[i] = i < queries * dim ? query[i] : 0.0f;
  __syncthreads();

  const auto* keys = reinterpret_cast<const uint4*>(*base_at);
  const int count = static_cast<int>(min(max(*count_at, int64_t{0}), int64_t{kNoRow - 1}));
  const int lane = threadIdx.x & 31, vectors = dim / 8;
  const int64_t warps = int64_t{gridDim.x} * kWarps;
  // Adjacent warps read adjacent keys, so that the grid reads contiguous memory.
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;

  WarpBest best[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) best[q].start(k);
  for (int64_t first = warp * kRows; first < count; first += warps * kRows) {
    float sum[kRows][Q] = {};
#pragma unroll 4
    for (int v = lane; v < vectors; v += 32) {
      uint4 key[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        key[r] = first + r < count ? __ldcs(keys + (first + r) * vectors + v) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r][q] = dot8(key[r], s_query + q * dim + v * 8, sum[r][q]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        float total = sum[r][q];
#pragma unroll
        for (int step = 16; step; step /= 2) total += __shfl_xor_sync(kAll, total, step);
        if (first + r < count) best[q].offer({total, static_cast<int>(first + r)});
      }
  }
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (q >= queries) break;
    merge_block(best[q], s_lists);
    if (threadIdx.x < k) found[(int64_t{blockIdx.x} * queries + q) * k + threadIdx.x] = best[q].mine;
  }
}

// grid: (queries). The best k of all blocks' lists.
__global__ void __launch_bounds__(kThreads) merge_lists(const Candidate* found, int lists, int k, int64_t* rows,
                                                        float* scores) {
  __shared__ Candidate s_lists[kWarps][32];
  const int q = blockIdx.x, queries = gridDim.x;
  WarpBest best;
  best.start(k);
  const int total = lists * k;
  for (int first = (threadIdx.x / 32) * 32; first < total; first += kThreads) {
    const int i = first + (threadIdx.x & 31);
    Candidate mine = {-INFINITY, kNoRow};
    if (i < total) mine = found[(int64_t{i / k} * queries + q) * k + i % k];
    best.offer_each(mine);
  }
  merge_block(best, s_lists);
  if (threadIdx.x >= k) return;
  const bool filled = best.mine.row != kNoRow;
  rows[q * k + threadIdx.x] = filled ? best.mine.row : -1;
  scores[q * k + threadIdx.x] = filled ? best.mine.score : NAN;
}

int scan_blocks() {
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), "topk");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "topk");
  return processors * kBlocksPerSm;
}

void check_sizes(int64_t queries, int64_t k) {
  if (queries < 1 || queries > kMaxQueries)
    throw std::invalid_argument("queries=" + std::to_string(queries) + " must be in 1.." + std::to_string(kMaxQueries));
  if (k < 1 || k > kMaxNeighbours)
    throw std::invalid_argument("k=" + std::to_string(k) + " must be in 1.." + std::to_string(kMaxNeighbours));
}

template <int Q>
void launch(const TopK& t, int blocks) {
  auto* stream = static_cast<cudaStream_t>(t.stream);
  auto* found = static_cast<Candidate*>(t.workspace);
  const int queries = static_cast<int>(t.queries), dim = static_cast<int>(t.dim), k = static_cast<int>(t.k);
  const size_t shared = sizeof(float) * Q * dim;
  // Dynamic shared memory above 48 KiB needs this attribute.
  check_cuda(cudaFuncSetAttribute(scan_keys<Q>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
             "topk");
  scan_keys<Q><<<blocks, kThreads, shared, stream>>>(t.base_at, t.count_at, t.query, queries, dim, k, found);
  check_cuda(cudaGetLastError(), "topk");
  merge_lists<<<queries, kThreads, 0, stream>>>(found, blocks, k, t.rows, t.scores);
  check_cuda(cudaGetLastError(), "topk");
}

}  // namespace

int64_t topk_workspace_bytes(int64_t queries, int64_t k) {
  check_sizes(queries, k);
  return int64_t{scan_blocks()} * queries * k * static_cast<int64_t>(sizeof(Candidate));
}

void topk(const TopK& t) {
  check_sizes(t.queries, t.k);
  if (t.dim < 8 || t.dim > 2048 || t.dim % 8)
    throw std::invalid_argument("dim=" + std::to_string(t.dim) + " must be a multiple of 8 in 8..2048");
  aligned(t.base_at, 8, "base_at");
  aligned(t.count_at, 8, "count_at");
  aligned(t.query, 4, "query");
  aligned(t.rows, 8, "rows");
  aligned(t.scores, 4, "scores");
  aligned(t.workspace, 8, "workspace");
  at_least(t.workspace_bytes, topk_workspace_bytes(t.queries, t.k), "workspace_bytes");
  const int blocks = scan_blocks();
  if (t.queries == 1) return launch<1>(t, blocks);
  if (t.queries == 2) return launch<2>(t, blocks);
  launch<4>(t, blocks);
}

}  // namespace ragturbo
