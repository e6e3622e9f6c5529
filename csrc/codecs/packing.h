// Two 4-bit codes a byte, the even column in the low nibble: the layout of every torch-side checkpoint.
#pragma once

#include <cstdint>

#include "base/matrix_view.h"

namespace mrgptq {

inline void pack_row(const std::uint8_t* codes, Index cols, std::uint8_t* packed) noexcept {
    for (Index j = 0; j < cols / 2; ++j) packed[j] = static_cast<std::uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
}

inline void unpack_row(const std::uint8_t* packed, Index cols, std::uint8_t* codes) noexcept {
    for (Index j = 0; j < cols / 2; ++j) {
        codes[2 * j] = packed[j] & 15;
        codes[2 * j + 1] = packed[j] >> 4;
    }
}

}  // namespace mrgptq
