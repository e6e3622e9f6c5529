#include "linalg/cholesky.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "base/buffer.h"
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

// A turn factorises so many panels, and then takes them off what lies to their right together: each of its elements is read and written once for all of them. More would not stay in the second cache.
constexpr Index panels = 2;

// The rows below a turn's panels as the products want them, panel by panel: `height` rows together, column by column.
template <class Real>
struct Below {
    static constexpr Index height = kernel_rows<Real>;
    Index first, rows;  // from the turn's first row on, though a panel has none before its own end
    Buffer<Real> data;

    explicit Below(Index n) : first(0), rows((n + height - 1) / height * height), data(panels * rows * panel) {}
    Real* of_rows(Index number, Index row) const noexcept { return data.data() + number * rows * panel + (row - first) * panel; }
    // Columns of the matrix are rows of the factor too: element (k, j) of the right one is at [k * height + j].
    const Real* of_columns(Index number, Index col) const noexcept { return of_rows(number, col - (col - first) % height) + (col - first) % height; }
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

// Pieces of `rows` rows rounded to float and laid as high as its products are.
void narrow_rows(const double* x, Index rows, float* to) noexcept {
    constexpr Index tall = Below<float>::height, parts = tall / height;
    for (Index first = 0; first < rows; first += tall, to += tall * panel)
        for (Index part = 0; part < parts; ++part, x += height * panel)
            for (Index k = 0; k < panel; ++k)
                for (Index r = 0; r < height; ++r) to[k * tall + part * height + r] = first + part * height < rows ? static_cast<float>(x[k * height + r]) : 0;
}

// A vector of products off as many elements of the matrix.
void subtract(double* from, Vector<double> v) noexcept { store<double>(from, load(from) - v); }
void subtract(double* from, Vector<float> v) noexcept {
    const auto [low, high] = widened(v);
    subtract(from, low);
    subtract(from + vector_size<double>, high);
}

// Takes a tile's products off the columns that begin at column_at(j).
template <class Real, class Column, class Before>
void subtract_tile(const Real* rows, const Real* cols, const Column& column_at, Before&& before) noexcept {
    constexpr Index tall = kernel_rows<Real>, line = Index{cache_line / sizeof(double)};
    for (Index j = 0; j < kernel_cols; ++j) {  // needed at the end: on its way meanwhile
        for (Index r = 0; r < tall; r += line) __builtin_prefetch(column_at(j) + r, 1);
        __builtin_prefetch(column_at(j) + tall - 1, 1);
    }
    sum_tile(panel, rows, tall, cols, tall, before, [&](Index j, Vector<Real> low, Vector<Real> high) {
        double* column = column_at(j);
        subtract(column, low);
        subtract(column + vector_size<Real>, high);
    });
}

// A tile of kernel_rows rows by kernel_cols columns that the matrix's end or its diagonal cuts: worked out beside, and only what is the matrix's own and not above its diagonal copied back.
template <class Real>
void subtract_cut(const Below<Real>& below, Index number, Index row, Index col, Index n, double* to, Index stride) noexcept {
    constexpr Index tall = kernel_rows<Real>;
    double tile[tall * kernel_cols];
    const Index rows = std::min(tall, n - row), cols = std::min(kernel_cols, n - col);
    for (Index j = 0; j < kernel_cols; ++j)
        for (Index r = 0; r < tall; ++r) tile[j * tall + r] = j < cols && r < rows && row + r >= col + j ? to[j * stride + r] : 0;
    subtract_tile(below.of_rows(number, row), below.of_columns(number, col), [&](Index j) { return tile + j * tall; }, [](Index) {});
    for (Index j = 0; j < cols; ++j)
        for (Index r = 0; r < rows; ++r)
            if (row + r >= col + j) to[j * stride + r] = tile[j * tall + r];
}

// Takes the products of a turn's first `count` panels off columns [begin, end) of an (n, n) matrix, on and below the diagonal.
template <class Real>
void subtract_products(const Below<Real>& below, Index count, double* columns, Index begin, Index end, Index n, Index stride, int threads) {
    constexpr Index block = 128;  // rows and columns that a thread takes at a time
    constexpr Index tall = kernel_rows<Real>, tile_lines = tall * kernel_cols * 2 * Index{sizeof(Real)} * panel / block / Index{cache_line};  // of the factors' next rows, for each tile
    const auto blocks = [&](Index from, Index to) { return (to - from + block - 1) / block; };
    const Index wide = blocks(begin, end);
    const auto in_row = [&](Index i) { return std::min(i + 1, wide); };
    Index pieces = 0;
    for (Index i = 0; count > 0 && i < blocks(begin, n); ++i) pieces += in_row(i);
    parallel_for(pieces, threads, [&](Index piece) {
        Index i = 0;
        while (piece >= in_row(i)) piece -= in_row(i++);
        const Index first_row = begin + i * block, first_col = begin + piece * block;
        for (Index number = 0; number < count; ++number) {
            // What the tiles send for: the same rows and columns of the next panel, behind the last one's those to the right.
            const bool last = number + 1 == count;
            const Real *next_rows = below.of_rows(last ? 0 : number + 1, first_row), *next_cols = below.of_rows(last ? 0 : number + 1, last ? first_col + block : first_col);
            Index sent = 0;  // elements
            for (Index row = first_row; row < std::min(first_row + block, n); row += tall)
                for (Index col = first_col; col < std::min(first_col + block, end); col += kernel_cols) {
                    if (row + tall <= col) break;  // above the diagonal
                    double* to = columns + col * stride + row;
                    if (row < col + kernel_cols || row + tall > n) {
                        subtract_cut(below, number, row, col, n, to, stride);
                        continue;
                    }
                    const SendAhead<tile_lines> next(sent < block * panel ? next_rows + sent : next_cols + sent - block * panel);
                    sent += tile_lines * Index{cache_line / sizeof(Real)};
                    subtract_tile(below.of_rows(number, row), below.of_columns(number, col), [=](Index j) { return to + j * stride; }, next);
                }
        }
    });
}

}  // namespace

template <class Real>
bool factorize(double* columns, Index n, Index stride, int threads) {
    constexpr Index rows_at_once = 128;  // of those below a panel, for a thread
    static_assert(rows_at_once % Below<Real>::height == 0 && Below<Real>::height % height == 0);
    constexpr bool narrow = sizeof(Real) < sizeof(double);
    Below<Real> below(n);
    for (Index turn = 0; turn < n; turn += panels * panel) {
        below.first = turn;
        for (Index number = 0; number < panels; ++number) {
            const Index start = turn + number * panel, width = std::min(panel, n - start), under = start + width;
            subtract_products(below, number, columns, start, under, n, stride, threads);
            double* corner = columns + start * stride + start;
            if (!factorize_square(corner, width, stride)) return false;
            if (under == n) return true;
            const Square square(corner, width, stride);
            parallel_for_ranges(n - under, rows_at_once, threads, [&](Index begin, Index end) {
                Real* packed = below.of_rows(number, under + begin);
                Buffer<double> wide;
                if constexpr (narrow) wide = Buffer<double>(rows_at_once * panel);
                double *from = corner + width + begin, *rows = nullptr;
                if constexpr (narrow)
                    rows = wide.data();
                else
                    rows = packed;
                pack_rows(from, stride, width, end - begin, rows);
                for (Index row = 0; row < end - begin; row += height) solve_rows(square, rows + row * panel);
                unpack_rows(rows, width, end - begin, from, stride);
                if constexpr (narrow) narrow_rows(rows, end - begin, packed);
            });
        }
        subtract_products(below, panels, columns, turn + panels * panel, n, n, stride, threads);
    }
    return true;
}

template bool factorize<float>(double*, Index, Index, int);
template bool factorize<double>(double*, Index, Index, int);

}  // namespace mrgptq
