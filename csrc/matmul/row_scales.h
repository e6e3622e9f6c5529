// What products in whole numbers make of a weight's stored scales: matmul/integer.h says why.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/buffer.h"
#include "formats/block_format.h"
#include "matmul/relative_scales.h"
#include "matmul/weight.h"
#include "simd/dot.h"
#include "simd/e4m3.h"
#include "simd/vector.h"

namespace mrgptq {

// E4M3's are taken as they are. Of `rows` rows, whole tiles of them.
template <class Format, Index rows>
class RowScales {
public:
    RowScales(const Weight&, Index) noexcept {}

    // What the sums of a row are to be multiplied by.
    static constexpr double factor(Index) noexcept { return 1.0; }

    // The scales that bytes stand for in the rows from `first` on.
    MRGPTQ_INLINE simd::Floats of(simd::Words bytes, Index) const noexcept { return simd::decode_e4m3(bytes); }
};

// MXFP4's are relative to the largest in their row.
template <Index rows>
class RowScales<Mxfp4, rows> {
public:
    RowScales(const Weight& weight, Index row) noexcept {
        const Index here = std::min(rows, weight.rows - row);
        if (!weight.tiled)
            for (Index r = 0; r < here; ++r)
                for (Index g = 0; g < weight.scales.cols; ++g) largest_[r] = std::max<std::uint32_t>(largest_[r], weight.scales.row(row + r)[g]);
        else
            for (Index first = 0; first < here; first += tile_rows) find_in_tile(weight.scale_tiles.row((row + first) / tile_rows), weight.scale_tiles.cols, largest_ + first);
    }

    double factor(Index r) const noexcept { return power_of_row(static_cast<int>(largest_[r]) - e8m0::bias); }

    MRGPTQ_INLINE simd::Floats of(simd::Words bytes, Index first) const noexcept { return relative_scales(bytes, simd::load(largest_ + first)); }

private:
    static void find_in_tile(const std::uint32_t* words, Index count, std::uint32_t* largest) noexcept {
        using simd::Bytes, simd::Words;
        for (Index first = 0; first < tile_rows; first += simd::lanes) {
            Bytes found{};
            for (Index word = first; word < count; word += tile_rows) {
                const Bytes four = (Bytes)simd::load(words + word);
                found = found > four ? found : four;
            }
            const Words pairs = (Words)found, upper = pairs >> 16, odd = pairs >> 8 & 0xFFu, even = pairs & 0xFFu;
            simd::store(largest + first, simd::max(simd::max(even, odd), simd::max(upper & 0xFFu, upper >> 8)));
        }
    }

    alignas(cache_line) std::uint32_t largest_[rows] = {};
};

}  // namespace mrgptq
