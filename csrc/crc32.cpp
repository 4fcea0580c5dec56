#include "crc32.hpp"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ragturbo {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;

using Tables = std::array<std::array<uint32_t, 256>, 16>;

// tables[k][b]: effect on the CRC of byte b followed by k more bytes.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < tables.size(); ++k)
    for (uint32_t byte = 0; byte < 256; ++byte)
      tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xFF];
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

uint32_t crc32_slice16(const void* data, size_t bytes, uint32_t value) {
  const auto* p = static_cast<const unsigned char*>(data);
  uint32_t crc = ~value;
  for (; bytes >= 16; bytes -= 16, p += 16) {
    uint32_t next = 0;
    for (int i = 0; i < 4; ++i) next ^= kTables[15 - i][p[i] ^ ((crc >> (8 * i)) & 0xFF)];
    for (int i = 4; i < 16; ++i) next ^= kTables[15 - i][p[i]];
    crc = next;
  }
  for (; bytes > 0; --bytes, ++p) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xFF];
  return ~crc;
}

#if defined(__x86_64__)

namespace {

// One folding step: moves a 128-bit remainder forward by the distance that its constants encode.
__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i remainder, __m128i constants, __m128i data) {
  const __m128i low = _mm_clmulepi64_si128(remainder, constants, 0x00);
  const __m128i high = _mm_clmulepi64_si128(remainder, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), data);
}

__attribute__((target("pclmul,sse4.1"))) inline __m128i load(const unsigned char* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Carry-less multiplication with constants x^n mod P in bit-reflected form (Gopal et al., "Fast CRC Computation for
// Generic Polynomials Using PCLMULQDQ", Intel 2009). Four lanes hide the multiplier's latency. `bytes` is a multiple of
// 16, at least 64. Takes and returns the CRC without the outer complement.
__attribute__((target("pclmul,sse4.1"))) uint32_t fold_blocks(const unsigned char* p, size_t bytes, uint32_t crc) {
  const __m128i by_512_bits = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
  const __m128i by_128_bits = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i by_64_bits = _mm_set_epi64x(0, 0x0163cd6124);
  const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i low_32 = _mm_set_epi32(0, ~0, 0, ~0);

  __m128i lane[4] = {load(p), load(p + 16), load(p + 32), load(p + 48)};
  lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  p += 64;
  bytes -= 64;
  for (; bytes >= 64; bytes -= 64, p += 64)
    for (int i = 0; i < 4; ++i) lane[i] = fold(lane[i], by_512_bits, load(p + 16 * i));
  __m128i x = lane[0];
  for (int i = 1; i < 4; ++i) x = fold(x, by_128_bits, lane[i]);
  for (; bytes >= 16; bytes -= 16, p += 16) x = fold(x, by_128_bits, load(p));

  // 128 bits to 64, 64 to 32, then Barrett reduction.
  x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, by_128_bits, 0x10));
  x = _mm_xor_si128(_mm_srli_si128(x, 4), _mm_clmulepi64_si128(_mm_and_si128(x, low_32), by_64_bits, 0x00));
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low_32), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_32), barrett, 0x00);
  return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(x, quotient), 1));
}

}  // namespace

bool has_pclmul() {
  static const bool supported = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return supported;
}

uint32_t crc32_pclmul(const void* data, size_t bytes, uint32_t value) {
  const auto* p = static_cast<const unsigned char*>(data);
  const size_t folded = bytes >= 64 ? bytes & ~size_t{15} : 0;
  if (folded) value = ~fold_blocks(p, folded, ~value);
  return crc32_slice16(p + folded, bytes - folded, value);
}

#else

bool has_pclmul() { return false; }
uint32_t crc32_pclmul(const void* data, size_t bytes, uint32_t value) { return crc32_slice16(data, bytes, value); }

#endif

uint32_t crc32(const void* data, size_t bytes, uint32_t value) {
  return has_pclmul() ? crc32_pclmul(data, bytes, value) : crc32_slice16(data, bytes, value);
}

}  // namespace ragturbo
