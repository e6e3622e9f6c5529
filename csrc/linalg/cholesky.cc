#include "linalg/cholesky.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/parallel.h"
#include "linalg/lanes.h"

namespace mrgptq {
namespace {

constexpr Index panel = product_depth;  // columns factorised together

// The panel's own square, column by column; what lies above its diagonal is left alone.
bool factorize_square(double* columns, Index n, Index stride) noexcept {
    for (Index c = 0; c < n; ++c) {
        double* mine = columns + c * stride;
        for (Index k = 0; k < c; ++k) {
            const double* other = columns + k * stride;
            const double weight = other[c];
            for (Index r = c; r < n; ++r) mine[r] -= weight * other[r];
        }
        if (!(mine[c] > 0)) return false;
        const double pivot = std::sqrt(mine[c]);
        mine[c] = pivot;
        for (Index r = c + 1; r < n; ++r) mine[r] /= pivot;
    }
    return true;
}

// The panel's square as the rows below it need it: column group g of kernel_cols columns in strips of Lᵀ, and the diagonal.
struct Square {
    Index width;
    std::vector<double> strips;  // strip g: (width, kernel_cols), element (k, j) = L[g * kernel_cols + j, k]

    Square(const double* columns, Index width, Index stride) : width(width), strips(static_cast<std::size_t>(strip_count(width) * kernel_cols * width)) {
        pack_strips(columns, stride, Index{1}, width, width, strips.data());
    }
    const double* strip(Index first) const noexcept { return strips.data() + first * width; }
};

// 32 rows below the square: x Lᵀ = x, solved from left to right, a group of columns at a time.
void solve_lanes(const Square& square, double* x) noexcept {
    for (Index first = 0; first < square.width; first += kernel_cols) {
        const double* strip = square.strip(first);
        double* group = x + first * lanes;
        for (Index row = 0; row < lanes && first > 0; row += kernel_rows<double>) multiply_tile<double, true>(first, x + row, lanes, strip, kernel_cols, group + row, lanes);
        const Index here = std::min(kernel_cols, square.width - first);
        for (Index j = 0; j < here; ++j) {
            double* column = group + j * lanes;
            for (Index i = 0; i < j; ++i) {
                const double weight = strip[(first + i) * kernel_cols + j];
                const double* solved = group + i * lanes;
                for (Index r = 0; r < lanes; ++r) column[r] -= weight * solved[r];
            }
            const double pivot = strip[(first + j) * kernel_cols + j];
            for (Index r = 0; r < lanes; ++r) column[r] /= pivot;
        }
    }
}

// The rows below a panel, packed both ways: as lanes for the left factor of what they take off the rest, as strips for the right one.
struct Below {
    Index rows, width;
    std::vector<double> left, right;

    Below(Index rows, Index width)
        : rows(rows), width(width), left(static_cast<std::size_t>((rows + lanes - 1) / lanes * lanes * width)), right(static_cast<std::size_t>((rows + lanes - 1) / lanes * lanes * width)) {}
    double* of_lanes(Index first_row) noexcept { return left.data() + first_row * width; }
    double* of_strip(Index first_row) noexcept { return right.data() + first_row * width; }
};

// A tile of 32 rows by kernel_cols columns that the matrix's end or its diagonal cuts: worked out beside, and only what is the matrix's own and not above its diagonal copied back.
void subtract_cut(Below& below, Index row, Index col, double* corner, Index stride) noexcept {
    double tile[lanes * kernel_cols];
    const Index rows = std::min(lanes, below.rows - row), cols = std::min(kernel_cols, below.rows - col);
    for (Index j = 0; j < cols; ++j)
        for (Index r = 0; r < rows; ++r) tile[j * lanes + r] = row + r >= col + j ? corner[j * stride + r] : 0;
    for (Index r = 0; r < lanes; r += kernel_rows<double>) multiply_tile<double, true>(below.width, below.of_lanes(row) + r, lanes, below.of_strip(col), kernel_cols, tile + r, lanes);
    for (Index j = 0; j < cols; ++j)
        for (Index r = 0; r < rows; ++r)
            if (row + r >= col + j) corner[j * stride + r] = tile[j * lanes + r];
}

}  // namespace

bool factorize(double* columns, Index n, Index stride, int threads) {
    constexpr Index block = 128;  // rows and columns of the rest that a thread takes at a time
    for (Index start = 0; start < n; start += panel) {
        const Index width = std::min(panel, n - start), rows = n - start - width;
        double* corner = columns + start * stride + start;
        if (!factorize_square(corner, width, stride)) return false;
        if (rows == 0) break;
        const Square square(corner, width, stride);
        Below below(rows, width);
        parallel_for((rows + lanes - 1) / lanes, threads, [&](Index piece) {
            const Index first = piece * lanes, here = std::min(lanes, rows - first);
            double* x = below.of_lanes(first);
            for (Index c = 0; c < width; ++c) std::copy_n(corner + c * stride + width + first, here, x + c * lanes);
            solve_lanes(square, x);
            for (Index c = 0; c < width; ++c) std::copy_n(x + c * lanes, here, corner + c * stride + width + first);
            pack_strips(x, lanes, Index{1}, width, lanes, below.of_strip(first));
        });
        double* rest = columns + (start + width) * stride + start + width;
        const Index blocks = (rows + block - 1) / block;
        parallel_for(blocks * (blocks + 1) / 2, threads, [&](Index piece) {
            Index i = 0;
            while ((i + 1) * (i + 2) / 2 <= piece) ++i;
            const Index first_row = i * block, first_col = (piece - i * (i + 1) / 2) * block;
            for (Index col = first_col; col < std::min(first_col + block, rows); col += kernel_cols)
                for (Index row = first_row; row < std::min(first_row + block, rows); row += lanes) {
                    if (row + lanes <= col) continue;  // above the diagonal
                    double* to = rest + col * stride + row;
                    if (row < col + kernel_cols || row + lanes > rows) {
                        subtract_cut(below, row, col, to, stride);
                        continue;
                    }
                    for (Index r = 0; r < lanes; r += kernel_rows<double>) multiply_tile<double, true>(width, below.of_lanes(row) + r, lanes, below.of_strip(col), kernel_cols, to + r, stride);
                }
        });
    }
    return true;
}

}  // namespace mrgptq
