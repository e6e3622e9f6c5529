// What every product asks of its operands.
#pragma once

#include <string>

#include "base/check.h"
#include "codecs/codec.h"

namespace mrgptq {

inline void check_shapes(Index tokens, Index cols, const PackedMatrix& weight, MatrixView<float> out) {
    check(weight.codes.cols * 2 == cols, "x has " + std::to_string(cols) + " columns; the weight has " + std::to_string(weight.codes.cols * 2));
    check(out.rows == tokens && out.cols == weight.codes.rows, "out has shape (" + std::to_string(out.rows) + ", " + std::to_string(out.cols) + "); the product has (" + std::to_string(tokens) + ", " +
                                                                   std::to_string(weight.codes.rows) + ")");
}

inline void check_scales(const PackedMatrix& matrix, Index group_size, const char* name) {
    check(matrix.codes.cols * 2 % group_size == 0 && matrix.scales.rows == matrix.codes.rows && matrix.scales.cols * group_size == matrix.codes.cols * 2,
          "scales do not have one entry for each group of " + std::string(name));
}

}  // namespace mrgptq
