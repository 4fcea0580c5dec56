#pragma once
#include <cstddef>
#include <cstdint>

namespace ragturbo {

// zlib's CRC-32 (reflected 0xEDB88320). `value` is the CRC of the preceding data, 0 at the start.
uint32_t crc32(const void* data, size_t bytes, uint32_t value = 0);

// The two implementations, for tests. The second needs a processor with `pclmulqdq`.
uint32_t crc32_slice16(const void* data, size_t bytes, uint32_t value);
uint32_t crc32_pclmul(const void* data, size_t bytes, uint32_t value);
bool has_pclmul();

}  // namespace ragturbo
