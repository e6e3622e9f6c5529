// From rows to tiles (matmul/weight.h) and back, byte for byte.
#pragma once

#include "matmul/weight.h"

namespace mrgptq {

// codes (tiles, cols / 8 * 32), scales (tiles, ceil(groups / 4) * 32): every word is written.
void make_tiles(const PackedMatrix& matrix, MatrixView<std::uint32_t> codes, MatrixView<std::uint32_t> scales, int threads);

// codes (rows, cols / 2), scales (rows, groups).
void read_tiles(const TiledMatrix& matrix, MatrixView<std::uint8_t> codes, MatrixView<std::uint8_t> scales, int threads);

}  // namespace mrgptq
