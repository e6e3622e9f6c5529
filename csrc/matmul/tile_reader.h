// Some tiles of a weight, side by side, from the first column to the last: where they lie, or turned from rows as they are read.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/buffer.h"
#include "base/parallel.h"
#include "matmul/weight.h"
#include "matmul/words.h"

namespace mrgptq {

// `most_depth` columns at a time, a multiple of 128.
template <Index tiles, Index most_depth>
class TileReader {
public:
    TileReader(const Weight& weight, Index group_size, Index row) noexcept : weight_(weight), group_size_(group_size), row_(row) {
        if (weight.tiled) {
            // Where the last tile has none beside it, it is read twice.
            const bool whole = row / tile_rows + tiles <= weight.code_tiles.rows;
            code_stride_ = whole ? weight.code_tiles.row_stride : 0;
            scale_stride_ = whole ? weight.scale_tiles.row_stride : 0;
            ahead_ = codes_ahead;
        } else {
            code_stride_ = most_depth / codes_a_word * tile_rows;
            scale_stride_ = line_words * tile_rows;
            ahead_ = 0;
        }
    }

    // Goes to the columns from k on, the next multiple of `most_depth`.
    void to(Index k, Index depth) noexcept {
        const Index group = k / group_size_;
        if (weight_.tiled) {
            codes_ = weight_.code_tiles.row(row_ / tile_rows) + k / codes_a_word * tile_rows;
            scales_ = weight_.scale_tiles.row(row_ / tile_rows) + group / scales_a_word * tile_rows;
            return;
        }
        constexpr Index rows_ahead = 512, scales_ahead = 128, scales_at_once = line_words * scales_a_word;  // bytes of a row, of which memory foresees few so far apart
        const Index at = group % scales_at_once;
        if (at == 0) turn(weight_.scales, group, std::min(scales_at_once, weight_.scales.cols - group), scales_ahead, scale_words_, scale_stride_);
        turn(weight_.codes, k / 2, depth / 2, rows_ahead, code_words_, code_stride_);
        codes_ = code_words_;
        scales_ = scale_words_ + at / scales_a_word * tile_rows;
    }

    // Eight columns' codes of as many rows as a vector has lanes, `word` words on from where `to` went.
    MRGPTQ_INLINE simd::Words codes(Index word, Index row) const noexcept {
        const std::uint32_t* const from = codes_ + row / tile_rows * code_stride_ + word * tile_rows + row % tile_rows;
        send_for_line(from, row, ahead_);
        return simd::load(from);
    }

    // Stored scales of four groups, `word` words of them on.
    MRGPTQ_INLINE simd::Words four_scales(Index word, Index row) const noexcept {
        const std::uint32_t* const from = scales_ + row / tile_rows * scale_stride_ + word * tile_rows + row % tile_rows;
        send_for_line(from, row, ahead_ / 4);
        return simd::load(from);
    }

    // Those of the group, `group` groups on.
    MRGPTQ_INLINE simd::Words scales(Index group, Index row) const noexcept {
        return four_scales(group / scales_a_word, row) >> static_cast<std::uint32_t>(8 * (group % scales_a_word)) & 0xFFu;
    }

private:
    // Asks for what lies `ahead` bytes from where a line begins, which may be where nothing is: of two or four streams a core, each read with much arithmetic between, processors foresee too little.
    MRGPTQ_INLINE static void send_for_line(const std::uint32_t* from, Index row, Index ahead) noexcept {
        if (row * 4 % static_cast<Index>(cache_line) == 0) __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(ahead)));
    }

    static constexpr Index line_words = 16;      // of a row's scales: a cache line of them
    static constexpr Index codes_ahead = 4096;  // bytes of a tile

    void turn(MatrixView<const std::uint8_t> from, Index byte, Index bytes, Index ahead, std::uint32_t* to, Index stride) const noexcept {
        turn_words<tiles * tile_rows>(from, row_, byte, bytes, ahead, [&](Index word, Index first, simd::Words turned) {
            simd::store(to + first / tile_rows * stride + word * tile_rows + first % tile_rows, turned);
        });
    }

    const Weight& weight_;
    Index group_size_, row_, code_stride_, scale_stride_, ahead_;
    const std::uint32_t *codes_ = nullptr, *scales_ = nullptr;
    // A square is turned whole, also where fewer words are wanted: 16 words at most, which divide both.
    alignas(cache_line) std::uint32_t code_words_[tiles * most_depth / codes_a_word * tile_rows];
    alignas(cache_line) std::uint32_t scale_words_[tiles * line_words * tile_rows];
};

inline constexpr Index few_rows = std::max(tile_rows, 4 * Index{simd::lanes});  // in hand together where tokens are few: whole tiles, and vectors enough that no chain waits for itself

inline constexpr Index tiles_together = 4;  // that take the same columns of many tokens, which lie far away

// Rows that a thread takes at a time: fewer where there would be too few pieces to share; no byte depends on it.
inline Index rows_of_piece(Index rows, int threads) noexcept {
    const Index team = threads > 0 ? threads : default_threads();
    return tile_rows * std::clamp<Index>(rows / (4 * tile_rows * team), 1, tiles_together);
}

}  // namespace mrgptq
