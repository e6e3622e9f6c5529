// Products with packed weights: y = x Ŵᵀ, Ŵ being the values that codes and scales stand for.
#pragma once

#include "matmul/weight.h"

namespace mrgptq {

// x (tokens, cols), weight (rows, cols), out (tokens, rows), which may not overlap x.
//
// Columns are cut into groups that share a scale, and into chunks of 128. A group's sum is a chain of fused multiply-adds of twice the codes' values, exact in float32, with the inputs, begun at zero; a
// chunk's is a chain of these with half of the groups' steps, begun at zero; an element is the sum of its chunks. So the bytes of a token's row depend neither on the tokens beside it nor
// on the number of threads; they are promised for each ISA level. What is not finite in x goes the way that IEEE 754 sends it.
void matmul(MatrixView<const float> x, const Weight& weight, MatrixView<float> out, int threads);

}  // namespace mrgptq
