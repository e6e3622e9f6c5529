// Products with packed weights of inputs that are rounded too, to four bits or to eight: whole numbers inside a group of columns, float32 from group to group.
//
// Rows of both operands are cut into groups of the smaller of their two group sizes. An element of out is
//
//   y = fl32(fl64(S F)),   S = Σ_g dot_g (s_g t_g)   in float32, group after group,
//
// dot_g being Σ a b over the group's columns in whole numbers, exact; a twice the value of the weight's code, b the same of the input's or its 8-bit integer; s_g and t_g the groups' scales, without the
// tensor scales; and F, in float64, what S has to be multiplied by: the tensor scales' reciprocals, the halves, and powers of two.
//
// Scales whose range is float32's own, MXFP4's and the steps of 8-bit inputs, are taken relative to 2^(e - 45), 2^e being the power of two at or below the largest of their row, and one that is then less
// than 2^-63 counts as zero. So no product of two scales under- or overflows, nor does a sum; what is less than 2^-108 of the largest in its row is lost. E4M3 spans 2^-9 to 448 and is taken as it is.
//
// Four bits: |dot_g| <= 32 * 12 * 12 = 4608 has 13 bits and s_g t_g at most eight, so their product is exact in float32's 24 and it does not matter whether it is added in one operation or in two. Eight
// bits: dot_g (s_g t_g) are two roundings and adding the product is a third, on every level. So the bytes of a token's row depend neither on the tokens beside it nor on the number of threads or the
// ISA level.
#pragma once

#include "matmul/weight.h"

namespace mrgptq {

// x (tokens, cols), weight (rows, cols), out (tokens, rows).
void matmul_packed(const PackedMatrix& x, const Weight& weight, MatrixView<float> out, int threads);

// x (tokens, cols), finite, is rounded first: each of the weight's groups of columns has the step t = fl32(amax / 127), and b = x / t, rounded to float32 and then to the nearest whole number, ties to
// even, held within -127 and 127; all zero where the step is. `out` may not overlap x.
void matmul_int8(MatrixView<const float> x, const Weight& weight, MatrixView<float> out, int threads);

}  // namespace mrgptq
