// GPTQ with static scales: visits columns in a factor's order, rounds each to its group's grid and feeds the error forward to the columns not yet visited.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/matrix_view.h"
#include "gptq/factor.h"

namespace mrgptq {

// float64 gives the codes of reference.py; float32 keeps errors and feedback in float32 and may part from it where a value lies within rounding of a tie.
enum class Precision { float32, float64 };
Precision precision_named(std::string_view name);

// weight (rows, cols) float32 in the basis of the factor's H, scales (rows, cols / group), codes (rows, cols / 2) written. Returns the loss Σ (w-q)ᵀ(H + λI)(w-q), summed in float64,
// where a dead column counts with weight 1. Rows are independent and worked off in tiles of 64: the same bytes for any number of threads.
double solve(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> scales, float tensor_scale, const Factor& factor, Precision precision,
             MatrixView<std::uint8_t> codes, int threads);

// tr(E H Eᵀ) in float64 for E (rows, cols) float32 and a symmetric H (cols, cols).
double quadratic_form(MatrixView<const float> e, MatrixView<const double> h, int threads);

}  // namespace mrgptq
