// A packed matrix in tiles, made by the code under test, and both forms that a product takes.
#pragma once

#include <cstdint>

#include "formats/block_format.h"
#include "matmul/tiles.h"
#include "matrices.h"

namespace mrgptq::testing {

class Tiled {
public:
    // What is not written would be seen: 0x77777777 are codes and scales too.
    explicit Tiled(const PackedMatrix& matrix, Layout layout = contiguous, int threads = 1)
        : codes(tiles_of(matrix.codes.rows), matrix.codes.cols / 4 * tile_rows, layout, 0x77777777u), scales(tiles_of(matrix.codes.rows), scale_words(matrix.scales.cols) * tile_rows, layout, 0x77777777u), matrix_(matrix) {
        make_tiles(matrix, codes.view(), scales.view(), threads);
    }

    TiledMatrix view() const { return {matrix_.format, matrix_.codes.rows, codes.view(), scales.view(), matrix_.tensor_scale}; }

    Matrix<std::uint32_t> codes, scales;

private:
    PackedMatrix matrix_;
};

// Calls f(weight) with the rows and with tiles of them.
template <class F>
void in_both_forms(const PackedMatrix& matrix, F&& f) {
    f(Weight(matrix));
    f(Weight(Tiled(matrix).view()));
}

}  // namespace mrgptq::testing
