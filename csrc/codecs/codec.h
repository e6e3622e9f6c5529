// Whole matrices to codes and scales and back. Rows are independent; every function gives the same bytes for any number of threads (0: the default) and on every ISA level.
//
// Shapes: weight (rows, cols), codes (rows, cols / 2) packed, scales (rows, cols / group_size). A rotation turns the columns first, in the same pass over
// memory; its bytes are those of rotating before.
#pragma once

#include <string_view>

#include "base/finite.h"
#include "codecs/scale_rule.h"
#include "rotations/rotation.h"

namespace mrgptq {

// A matrix in codes and scales.
struct PackedMatrix {
    std::string_view format;
    MatrixView<const std::uint8_t> codes, scales;
    float tensor_scale = 1;
};

// The largest magnitude; 0 for an empty matrix, NaN where a value is not finite. Throws where the rotation overflows.
float amax(MatrixView<const float> x, int threads, const Rotation& rotation = {});

// Scales and codes in one pass. Returns -1, or the row-major position of the first value that is not finite; codes and scales are then of no use. Throws where the rotation overflows.
Index quantize(std::string_view format, const ScaleRule& rule, MatrixView<const float> weight, float tensor_scale, MatrixView<std::uint8_t> codes, MatrixView<std::uint8_t> scales, int threads,
               const Rotation& rotation = {});

// For finite weights that the rotation does not make overflow; where the rule weighs errors by a hessian, its entries (cols, group_size) of each column with the columns of its own group, otherwise a matrix without columns.
void find_scales(std::string_view format, const ScaleRule& rule, MatrixView<const float> weight, float tensor_scale, MatrixView<const double> hessian, MatrixView<std::uint8_t> scales, int threads,
                 const Rotation& rotation = {});

void encode(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> scales, float tensor_scale, MatrixView<std::uint8_t> codes, int threads, const Rotation& rotation = {});

void dequantize(std::string_view format, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, MatrixView<float> out, int threads);

// dequantize(quantize(x)) without the codes; `out` may be `x`. Returns as quantize() does; what lies before that position may have been written.
Index round_to_grid(std::string_view format, const ScaleRule& rule, MatrixView<const float> x, float tensor_scale, MatrixView<float> out, int threads, const Rotation& rotation = {});

// Σ (w - ŵ)² of the values ŵ that codes and scales stand for, the differences in float32, and Σ w², both summed in float64 row by row: the same for any number of threads.
struct SquareSums {
    double error = 0, energy = 0;
};
SquareSums square_sums(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, int threads,
                       const Rotation& rotation = {});

// The same of (w - ŵ)², w ŵ and ŵ²: what a factor for all ŵ is fitted by.
struct FitSums {
    double error = 0, dot = 0, square = 0;
};
FitSums fit_sums(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, int threads, const Rotation& rotation = {});

}  // namespace mrgptq
