#include "matmul/tiles.h"

#include <algorithm>
#include <cstring>

#include "base/parallel.h"
#include "formats/block_format.h"
#include "matmul/words.h"

namespace mrgptq {
namespace {

// All words of a tile's rows from `row` on.
void turn_tile(MatrixView<const std::uint8_t> from, Index row, std::uint32_t* to) noexcept {
    constexpr Index nothing_ahead = 0;
    const Index words = (from.cols + 3) / 4;
    turn_words<tile_rows>(from, row, 0, from.cols, nothing_ahead, [&](Index word, Index first, simd::Words turned) {
        if (word < words) simd::store(to + word * tile_rows + first, turned);
    });
}

void read_tile(const std::uint32_t* from, MatrixView<std::uint8_t> to, Index row) noexcept {
    for (Index r = 0; r < std::min(tile_rows, to.rows - row); ++r)
        for (Index byte = 0; byte < to.cols; byte += 4) std::memcpy(to.row(row + r) + byte, from + byte / 4 * tile_rows + r, static_cast<std::size_t>(std::min<Index>(4, to.cols - byte)));
}

}  // namespace

void make_tiles(const PackedMatrix& matrix, MatrixView<std::uint32_t> codes, MatrixView<std::uint32_t> scales, int threads) {
    with_format(matrix.format, [&]<class Format>(Format) {
        check_scales(matrix, Format::group_size, "the matrix");
        check_tiles(matrix.codes.rows, matrix.codes.cols * 2, Format::group_size, codes.rows, codes.cols, scales.rows, scales.cols);
    });
    parallel_for(codes.rows, threads, [&](Index tile) {
        turn_tile(matrix.codes, tile * tile_rows, codes.row(tile));
        turn_tile(matrix.scales, tile * tile_rows, scales.row(tile));
    });
}

void read_tiles(const TiledMatrix& matrix, MatrixView<std::uint8_t> codes, MatrixView<std::uint8_t> scales, int threads) {
    with_format(matrix.format, [&]<class Format>(Format) {
        check_weight(matrix, Format::group_size);
        check_scales({matrix.format, codes, scales}, Format::group_size, "the matrix");
        check_tiles(codes.rows, codes.cols * 2, Format::group_size, matrix.codes.rows, matrix.codes.cols, matrix.scales.rows, matrix.scales.cols);
    });
    parallel_for(matrix.codes.rows, threads, [&](Index tile) {
        read_tile(matrix.codes.row(tile), codes, tile * tile_rows);
        read_tile(matrix.scales.row(tile), scales, tile * tile_rows);
    });
}

}  // namespace mrgptq
