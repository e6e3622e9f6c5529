// A packed weight, as rows that a checkpoint stores or as tiles that products read without turning anything.
//
// A tile is 32 rows, a row a lane: words of eight codes (four bytes of a row, as they lie there), 32 rows' first word, their second, and so on; words of four scales likewise. Behind the last row and
// the last scale is zero.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/check.h"
#include "codecs/codec.h"

namespace mrgptq {

inline constexpr Index tile_rows = 32, codes_a_word = 8, scales_a_word = 4;

constexpr Index tiles_of(Index rows) noexcept { return (rows + tile_rows - 1) / tile_rows; }
constexpr Index scale_words(Index groups) noexcept { return (groups + scales_a_word - 1) / scales_a_word; }

// codes (tiles, words * 32), scales (tiles, words * 32).
struct TiledMatrix {
    std::string_view format;
    Index rows;
    MatrixView<const std::uint32_t> codes, scales;
    float tensor_scale = 1;
};

struct Weight {
    std::string_view format;
    Index rows, cols;
    float tensor_scale;
    MatrixView<const std::uint8_t> codes = {}, scales = {};             // where it lies in rows
    MatrixView<const std::uint32_t> code_tiles = {}, scale_tiles = {};  // where it lies in tiles
    bool tiled;

    Weight(const PackedMatrix& matrix) noexcept
        : format(matrix.format), rows(matrix.codes.rows), cols(matrix.codes.cols * 2), tensor_scale(matrix.tensor_scale), codes(matrix.codes), scales(matrix.scales), tiled(false) {}
    Weight(const TiledMatrix& matrix) noexcept
        : format(matrix.format), rows(matrix.rows), cols(matrix.codes.cols / tile_rows * codes_a_word), tensor_scale(matrix.tensor_scale), code_tiles(matrix.codes), scale_tiles(matrix.scales), tiled(true) {}
};

inline void check_scales(const PackedMatrix& matrix, Index group_size, const char* name) {
    check(matrix.codes.cols * 2 % group_size == 0 && matrix.scales.rows == matrix.codes.rows && matrix.scales.cols * group_size == matrix.codes.cols * 2,
          "scales do not have one entry for each group of " + std::string(name));
}

inline void check_tiles(Index rows, Index cols, Index group_size, Index code_rows, Index code_cols, Index scale_rows, Index scale_cols) {
    check(rows >= 0 && cols % group_size == 0 && code_rows == tiles_of(rows) && scale_rows == code_rows && code_cols == cols / codes_a_word * tile_rows && scale_cols == scale_words(cols / group_size) * tile_rows,
          "tiles of codes and scales do not fit a matrix of " + std::to_string(rows) + " rows and " + std::to_string(cols) + " columns");
}

inline void check_weight(const Weight& weight, Index group_size) {
    if (weight.tiled)
        check_tiles(weight.rows, weight.cols, group_size, weight.code_tiles.rows, weight.code_tiles.cols, weight.scale_tiles.rows, weight.scale_tiles.cols);
    else
        check_scales({weight.format, weight.codes, weight.scales}, group_size, "the weight");
}

// What every product asks of its operands.
inline void check_shapes(Index tokens, Index cols, const Weight& weight, MatrixView<float> out) {
    check(weight.cols == cols, "x has " + std::to_string(cols) + " columns; the weight has " + std::to_string(weight.cols));
    check(out.rows == tokens && out.cols == weight.rows, "out has shape (" + std::to_string(out.rows) + ", " + std::to_string(out.cols) + "); the product has (" + std::to_string(tokens) + ", " +
                                                             std::to_string(weight.rows) + ")");
}

}  // namespace mrgptq
