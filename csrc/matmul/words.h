// Squares of words, four bytes each, of as many rows as a vector has lanes, turned as they are read: a vector holds a word of every row.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "base/buffer.h"
#include "base/matrix_view.h"
#include "linalg/squares.h"
#include "simd/vector.h"

namespace mrgptq {

// Asks for the cache line `offset` bytes from an address.
MRGPTQ_INLINE void send_for(const std::uint8_t* from, Index offset) noexcept { __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(offset)), 0, 2); }

using WordSquare = std::array<simd::Words, simd::lanes>;

// Rows lie `stride` bytes apart. What lies `ahead` bytes from each is sent for, which may be where nothing is: memory foresees few of 32 rows that are read side by side.
MRGPTQ_INLINE WordSquare load_turned(const std::uint8_t* from, Index stride, Index ahead) noexcept {
    WordSquare square;
#if defined(MRGPTQ_AVX512)
    // Quarters of four rows go where they belong as they are read, which is left to the loads; four words by four rows remain to be turned inside each quarter.
    Index four = 4 * stride, twelve = 12 * stride;
    const std::uint8_t* row[4] = {from, from + stride, from + 2 * stride, from + 3 * stride};
    asm("" : "+r"(four), "+r"(twelve), "+r"(row[0]), "+r"(row[1]), "+r"(row[2]), "+r"(row[3]));  // sixteen addresses of their own would be more than there are registers
    for (const std::uint8_t* of_four : row)
        for (const Index offset : {Index{0}, four, 2 * four, twelve}) send_for(of_four, offset + ahead);
    for (std::size_t quarter = 0; quarter < 4; ++quarter) {
        __m512i rows[4];
        for (std::size_t j = 0; j < 4; ++j) {
            const auto read = [&](Index offset) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[j] + offset + 16 * quarter)); };
            rows[j] = _mm512_castsi128_si512(read(0));
            rows[j] = _mm512_mask_broadcast_i32x4(rows[j], 0x00F0, read(four));
            rows[j] = _mm512_mask_broadcast_i32x4(rows[j], 0x0F00, read(2 * four));
            rows[j] = _mm512_mask_broadcast_i32x4(rows[j], 0xF000, read(twelve));
        }
        const __m512i low[2] = {_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpacklo_epi32(rows[2], rows[3])};
        const __m512i high[2] = {_mm512_unpackhi_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[2], rows[3])};
        square[4 * quarter] = (simd::Words)_mm512_unpacklo_epi64(low[0], low[1]);
        square[4 * quarter + 1] = (simd::Words)_mm512_unpackhi_epi64(low[0], low[1]);
        square[4 * quarter + 2] = (simd::Words)_mm512_unpacklo_epi64(high[0], high[1]);
        square[4 * quarter + 3] = (simd::Words)_mm512_unpackhi_epi64(high[0], high[1]);
    }
    return square;
#else
    for (std::size_t r = 0; r < square.size(); ++r) {
        const std::uint8_t* const row = from + static_cast<Index>(r) * stride;
        send_for(row, ahead);
        std::memcpy(&square[r], row, sizeof square[r]);
    }
    return turned(square);
#endif
}

// Words of four bytes of `tile_rows` rows: take(word, the first of its rows, a vector of as many rows' words as it has lanes). Behind the last row and behind `bytes` is zero. What lies `ahead` bytes further is
// sent for, and where that is behind the row's end, as far in the row that the next tile begins with.
template <Index tile_rows, class Take>
MRGPTQ_INLINE void turn_words(MatrixView<const std::uint8_t> from, Index row, Index byte, Index bytes, Index ahead, Take&& take) noexcept {
    constexpr Index w = simd::lanes, side = w * 4;
    for (Index begin = byte; begin < byte + bytes; begin += side) {
        const Index next = begin + ahead < from.cols ? ahead : ahead - from.cols + tile_rows * from.row_stride, here = std::min(side, byte + bytes - begin);
        for (Index first = 0; first < tile_rows; first += w) {
            const Index rows = std::clamp<Index>(from.rows - row - first, 0, w);
            WordSquare square;
            if (rows == w && here == side) [[likely]] {
                square = load_turned(from.row(row + first) + begin, from.row_stride, next);
            } else {
                alignas(cache_line) std::uint8_t part[w * side] = {};
                for (Index r = 0; r < rows; ++r) std::copy_n(from.row(row + first + r) + begin, here, part + r * side);
                square = load_turned(part, side, 0);
            }
            for (Index i = 0; i < w; ++i) take((begin - byte) / 4 + i, first, square[static_cast<std::size_t>(i)]);
        }
    }
}

}  // namespace mrgptq
