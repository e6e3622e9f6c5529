// x U = x and x Uᵀ = x in place for tiles of rows, U being Factor::unit: unit lower triangular by position. By blocks of columns, so that nearly all of it are products.
#pragma once

#include <vector>

#include "gptq/factor.h"
#include "gptq/tile.h"

namespace mrgptq {

// Solves x U = x, from the last column to the first. x: tiles of as many columns as the factor has.
void divide_by_unit(std::vector<Tile<double>>& x, const Factor& factor);

// Solves x Uᵀ = x, from the first column to the last.
void divide_by_transposed_unit(std::vector<Tile<double>>& x, const Factor& factor);

// The same for x U = x with a square [begin, end) of U alone, x of its columns.
void divide_by_square(std::vector<Tile<double>>& x, const Factor& factor, Index begin, Index end);

}  // namespace mrgptq
