#pragma once
// Elements of fp32 and bf16 memory, and functions of fp32 values that compilers turn into vector instructions.
#include <cstdint>
#include <cstring>

// Functions with this attribute are compiled once per level of x86-64, and glibc's loader chooses by the processor. What
// they call must be RAGTURBO_INLINE, or it stays at the lowest level.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define RAGTURBO_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 7
#define RAGTURBO_VECTOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RAGTURBO_VECTOR
#endif
#define RAGTURBO_INLINE inline __attribute__((always_inline))

namespace ragturbo {

struct bf16 {
  uint16_t bits;
};

RAGTURBO_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

RAGTURBO_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

RAGTURBO_INLINE float load(float x) { return x; }
RAGTURBO_INLINE float load(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

RAGTURBO_INLINE void store(float* to, float value) { *to = value; }

// To the nearest, ties to even, as torch rounds. NaN stays NaN.
RAGTURBO_INLINE void store(bf16* to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// e^x to 2 units in the last place between -87 and 88, clamped to these ends beyond; of NaN that of -87.
RAGTURBO_INLINE float exp_of(float x) {
  x = x > -87.0f ? (x < 88.0f ? x : 88.0f) : -87.0f;
  // Adding and subtracting 1.5·2^23 rounds to an integer.
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  // ln 2 in two parts, so that n·ln 2 is exact enough.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// x·sigmoid(x). NaN and infinities behave as in torch: the clamp in exp_of must not hide them. Below -1e30, where torch
// gives 0, the clamp leaves a small negative number.
RAGTURBO_INLINE float silu_of(float x) {
  const float y = x / (1.0f + exp_of(-x));
  return x - x == 0.0f ? y : (x > 0.0f ? x : x - x);
}

}  // namespace ragturbo
