// Whole matrices to codes and scales and back. Rows are independent; every function gives the same bytes for any number of threads (0: the default) and on every ISA level.
//
// Shapes: weight (rows, cols), codes (rows, cols / 2) packed, scales (rows, cols / group_size). Values are finite: the caller asked first_nonfinite().
#pragma once

#include <string_view>

#include "codecs/scale_rule.h"

namespace mrgptq {

// The largest magnitude; 0 for an empty matrix.
float amax(MatrixView<const float> x, int threads);

// Row-major position of the first NaN or infinity, -1 where all is finite.
Index first_nonfinite(MatrixView<const float> x, int threads);

// hessian (cols, cols) where the rule weighs errors by it; without columns otherwise.
void find_scales(std::string_view format, const ScaleRule& rule, MatrixView<const float> weight, float tensor_scale, MatrixView<const double> hessian, MatrixView<std::uint8_t> scales, int threads);

void encode(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> scales, float tensor_scale, MatrixView<std::uint8_t> codes, int threads);

void dequantize(std::string_view format, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, MatrixView<float> out, int threads);

// dequantize(encode(x)) without the codes; `out` may be `x`.
void round_to_grid(std::string_view format, const ScaleRule& rule, MatrixView<const float> x, float tensor_scale, MatrixView<float> out, int threads);

}  // namespace mrgptq
