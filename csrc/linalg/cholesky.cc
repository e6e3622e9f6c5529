#include "linalg/cholesky.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
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

// Rows that are worked off together, adjacent in each column: with the panel's columns a quarter to half of the first cache, which leaves the rest to what they are multiplied with.
constexpr Index height = kernel_rows<double>;
static_assert(height % kernel_cols == 0);

// A whole group of columns against its own triangle, which stays in registers.
template <Index cols>
void solve_group(const double* triangle, double* x) noexcept {
    constexpr Index w = vector_size<double>;
    std::array<Vector<double>, cols> low, high;
#pragma GCC unroll 8
    for (Index j = 0; j < cols; ++j) {
        Vector<double> a = load(x + j * height), b = load(x + j * height + w);
#pragma GCC unroll 8
        for (Index i = 0; i < j; ++i) {
            const Vector<double> weight = splat(triangle[i * kernel_cols + j]);
            a -= weight * low[i];
            b -= weight * high[i];
        }
        const Vector<double> pivot = splat(triangle[j * kernel_cols + j]);
        low[j] = a / pivot;
        high[j] = b / pivot;
        store(x + j * height, low[j]);
        store(x + j * height + w, high[j]);
    }
}

// `height` rows below the square: x Lᵀ = x, solved from left to right, a group of columns at a time.
void solve_rows(const Square& square, double* x) noexcept {
    for (Index first = 0; first < square.width; first += kernel_cols) {
        const double* strip = square.strip(first);
        double* group = x + first * height;
        if (first > 0) multiply_tile<double, true>(first, x, height, strip, kernel_cols, group, height);
        const Index here = std::min(kernel_cols, square.width - first);
        if (here == kernel_cols)
            solve_group<kernel_cols>(strip + first * kernel_cols, group);
        else
            for (Index j = 0; j < here; ++j) {
                double* column = group + j * height;
                for (Index i = 0; i < j; ++i)
                    for (Index r = 0; r < height; ++r) column[r] -= strip[(first + i) * kernel_cols + j] * group[i * height + r];
                for (Index r = 0; r < height; ++r) column[r] /= strip[(first + j) * kernel_cols + j];
            }
    }
}

// The rows below a panel, packed both ways: `height` of them together as the left factor of what they take off the rest, in strips as the right one. Room for the first panel's, which has most.
struct Below {
    Index first = 0, width = 0;  // the matrix's row that is the first here; the panel's columns
    std::unique_ptr<double[]> left, right;

    explicit Below(Index most_rows) {
        const auto size = static_cast<std::size_t>((most_rows + height - 1) / height * height * panel);
        left = std::make_unique_for_overwrite<double[]>(size);
        right = std::make_unique_for_overwrite<double[]>(size);
    }
    double* of_rows(Index row) noexcept { return left.get() + (row - first) * width; }
    double* of_strip(Index row) noexcept { return right.get() + (row - first) * width; }
};

// Columns of `rows` rows between the matrix and pieces of `height` rows, one piece after the other, down a column at a time as memory likes it; rows that are not there are zero in the pieces.
void pack_rows(const double* columns, Index stride, Index width, Index rows, double* x) noexcept {
    for (Index c = 0; c < width; ++c, columns += stride, x += height) {
        double* piece = x;
        Index first = 0;
        for (; first + height <= rows; first += height, piece += height * width)
            for (Index r = 0; r < height; ++r) piece[r] = columns[first + r];
        if (first < rows)
            for (Index r = 0; r < height; ++r) piece[r] = first + r < rows ? columns[first + r] : 0;
    }
}

void unpack_rows(const double* x, Index width, Index rows, double* columns, Index stride) noexcept {
    for (Index c = 0; c < width; ++c, columns += stride, x += height) {
        const double* piece = x;
        Index first = 0;
        for (; first + height <= rows; first += height, piece += height * width)
            for (Index r = 0; r < height; ++r) columns[first + r] = piece[r];
        for (Index r = first; r < rows; ++r) columns[r] = piece[r - first];
    }
}

// A tile of `height` rows by kernel_cols columns that the matrix's end or its diagonal cuts: worked out beside, and only what is the matrix's own and not above its diagonal copied back.
void subtract_cut(Below& below, Index row, Index col, Index n, double* to, Index stride) noexcept {
    double tile[height * kernel_cols];
    const Index rows = std::min(height, n - row), cols = std::min(kernel_cols, n - col);
    for (Index j = 0; j < kernel_cols; ++j)
        for (Index r = 0; r < height; ++r) tile[j * height + r] = j < cols && r < rows && row + r >= col + j ? to[j * stride + r] : 0;
    multiply_tile<double, true>(below.width, below.of_rows(row), height, below.of_strip(col), kernel_cols, tile, height);
    for (Index j = 0; j < cols; ++j)
        for (Index r = 0; r < rows; ++r)
            if (row + r >= col + j) to[j * stride + r] = tile[j * height + r];
}

// Takes the panel's products off what lies to its right, on and below the diagonal of an (n, n) matrix.
void subtract_products(Below& below, double* columns, Index n, Index stride, int threads) {
    constexpr Index block = 256;  // rows and columns that a thread takes at a time: their factors, 256 KiB each, stay in the second cache
    const Index begin = below.first, blocks = (n - begin + block - 1) / block;
    parallel_for(blocks * (blocks + 1) / 2, threads, [&](Index piece) {
        Index i = 0;
        while ((i + 1) * (i + 2) / 2 <= piece) ++i;
        const Index first_row = begin + i * block, first_col = begin + (piece - i * (i + 1) / 2) * block;
        for (Index row = first_row; row < std::min(first_row + block, n); row += height)
            for (Index col = first_col; col < std::min(first_col + block, n); col += kernel_cols) {
                if (row + height <= col) break;  // above the diagonal
                double* to = columns + col * stride + row;
                if (row < col + kernel_cols || row + height > n)
                    subtract_cut(below, row, col, n, to, stride);
                else
                    multiply_tile<double, true>(below.width, below.of_rows(row), height, below.of_strip(col), kernel_cols, to, stride);
            }
    });
}

}  // namespace

bool factorize(double* columns, Index n, Index stride, int threads) {
    constexpr Index rows_at_once = 128;  // of those below a panel, for a thread
    Below below(std::max<Index>(n - panel, 0));
    for (Index start = 0; start < n; start += panel) {
        const Index width = std::min(panel, n - start);
        below.width = width;
        below.first = start + width;
        double* corner = columns + start * stride + start;
        if (!factorize_square(corner, width, stride)) return false;
        if (below.first == n) break;
        const Square square(corner, width, stride);
        parallel_for_ranges(n - below.first, rows_at_once, threads, [&](Index begin, Index end) {
            double *from = corner + width + begin, *rows = below.of_rows(below.first + begin);
            pack_rows(from, stride, width, end - begin, rows);
            for (Index row = below.first + begin; row < below.first + end; row += height) {
                solve_rows(square, below.of_rows(row));
                pack_strips(below.of_rows(row), height, Index{1}, width, height, below.of_strip(row));
            }
            unpack_rows(rows, width, end - begin, from, stride);
        });
        subtract_products(below, columns, n, stride, threads);
    }
    return true;
}

}  // namespace mrgptq
