#pragma once
#include <cstdint>

namespace ragturbo {

// GroupNorm of channels_last memory on a CPU: SiLU((x + add_bias − mean) · rstd · weight + bias), the SiLU if asked for.
struct GroupNorm {
  const void* x;  // (batch, pixels, channels), fp32 or bf16
  void* out;      // as x
  bool bf16;
  int64_t batch, pixels, channels, groups;
  const float *weight, *bias;  // (channels)
  const float* add_bias;       // (channels) or null
  float eps;
  bool silu;
  int threads;
};
void group_norm(const GroupNorm& request);

}  // namespace ragturbo
