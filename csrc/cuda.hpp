#pragma once
#include <cstddef>
#include <cstdint>

// Interface of the CUDA part: raw device pointers and a stream handle, no torch. Base addresses and counts are read from
// device memory (`*_at` points to one int64), so that a captured graph follows a database swap. Throws
// std::invalid_argument for bad arguments and std::runtime_error with CUDA's message for a failed launch.
namespace ragturbo {

enum class Stored { float16, int8 };

// out[i] = row ids[i] of the table at *base_at, as fp16 (n, tokens, channels); zeros where ids[i] is not in
// 0..*count_at - 1. Rows are `stride` bytes apart in device or page-locked host memory. An int8 row is tokens·channels
// int8, then `tokens` fp32 scales: value = int8 · scale.
struct Gather {
  const int64_t* base_at;
  const int64_t* count_at;
  const int64_t* ids;
  int64_t n;
  int64_t tokens;
  int64_t channels;
  int64_t stride;
  Stored stored;
  void* out;
  void* stream;
};
void gather_rows(const Gather& gather);

constexpr int kMaxQueries = 4;
constexpr int kMaxNeighbours = 32;

// The k largest inner products of each fp32 query (queries, dim) with *count_at fp16 keys (·, dim) at *base_at, in
// two launches: rows int64 and scores fp32 (queries, k), best first, equal scores by ascending row. Unused places are
// row -1, score NaN; a key whose product is NaN is never returned.
struct TopK {
  const int64_t* base_at;
  const int64_t* count_at;
  const float* query;
  int64_t queries;
  int64_t dim;
  int64_t k;
  int64_t* rows;
  float* scores;
  void* workspace;
  int64_t workspace_bytes;
  void* stream;
};
void topk(const TopK& search);
// For the current device.
int64_t topk_workspace_bytes(int64_t queries, int64_t k);

}  // namespace ragturbo
