// Rows of a matrix into the 32 lanes of a tile, and codes from a tile back into packed rows. Both walk a matrix by whole cache lines, turned in a buffer that fits the first cache: a walk down
// its columns would fetch each line once for every value in it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "formats/e2m1.h"
#include "gptq/tile.h"
#include "linalg/squares.h"

namespace mrgptq {

// tile column place(c), lane r = row first_row + r of the matrix, column c; the lanes behind the matrix's last row are left alone.
template <class Real, class From, class Place>
void rows_to_lanes(MatrixView<const From> from, Index first_row, Real* tile, Place&& place) noexcept {
    constexpr Index few = 16, width = vector_size<From>;
    const Index rows = std::min(lanes, from.rows - first_row);
    alignas(cache_line) std::array<std::array<From, lanes>, few> columns;
    for (Index begin = 0; begin < from.cols; begin += few) {
        const Index here = std::min(few, from.cols - begin);
        if (rows == lanes && here == few) {
            for (Index r = 0; r < lanes; r += width)
                for (Index c = 0; c < few; c += width) {
                    SquareOf<From> square;
                    for (Index i = 0; i < width; ++i) square[static_cast<std::size_t>(i)] = load(from.row(first_row + r + i) + begin + c);
                    square = turned(square);
                    for (Index i = 0; i < width; ++i) store(columns[static_cast<std::size_t>(c + i)].data() + r, square[static_cast<std::size_t>(i)]);
                }
        } else {
            for (Index r = 0; r < rows; ++r)
                for (Index c = 0; c < here; ++c) columns[static_cast<std::size_t>(c)][static_cast<std::size_t>(r)] = from.row(first_row + r)[begin + c];
        }
        for (Index c = 0; c < here; ++c) std::copy_n(columns[static_cast<std::size_t>(c)].data(), rows, tile + place(begin + c) * lanes);
    }
}

// Codes of a tile's rows, two a byte, into rows [first_row, first_row + rows) of `packed`. Column c of the matrix stands in the tile at place(c), each value twice itself.
template <class Place>
void halves_to_rows(const std::int8_t* halves, MatrixView<std::uint8_t> packed, Index first_row, Index rows, Place&& place) noexcept {
    constexpr Index few = 64;
    std::array<std::array<std::uint8_t, few>, lanes> turned;
    for (Index begin = 0; begin < packed.cols; begin += few) {
        const Index here = std::min(few, packed.cols - begin);
        for (Index j = 0; j < here; ++j) {
            const std::int8_t *even = halves + place(2 * (begin + j)) * lanes, *odd = halves + place(2 * (begin + j) + 1) * lanes;
            std::array<std::uint8_t, lanes> bytes;
            for (std::size_t r = 0; r < lanes; ++r) bytes[r] = static_cast<std::uint8_t>(e2m1::encode_halves(even[r]) | e2m1::encode_halves(odd[r]) << 4);
            for (std::size_t r = 0; r < lanes; ++r) turned[r][static_cast<std::size_t>(j)] = bytes[r];
        }
        for (Index r = 0; r < rows; ++r) std::copy_n(turned[static_cast<std::size_t>(r)].data(), here, packed.row(first_row + r) + begin);
    }
}

}  // namespace mrgptq
