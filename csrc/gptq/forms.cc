#include "gptq/forms.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"
#include "codecs/scale_rule.h"
#include "gptq/rows.h"
#include "gptq/tile.h"
#include "rotations/rotated_rows.h"

namespace mrgptq {
namespace {

// A power of two near 1 / max|x| of what decides a matrix's range, so that float32 holds what matters of it; 1 where that is zero, or in float64, which needs none. Undoing it is exact. Its
// exponent stays within `most`, so that the factor itself is finite where the largest value is subnormal.
template <class Real>
double unit_scale(double largest, int most) noexcept {
    return std::is_same_v<Real, float> && largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -most, most)) : 1.0;
}

// Of a second moment, none of whose entries exceeds the largest of its diagonal.
template <class Real>
double scale_of(const SecondMoment& h) noexcept {
    double largest = 0;
    for (Index i = 0; i < h.size(); ++i) largest = std::max(largest, std::fabs(h.diagonal(i)));
    return unit_scale<Real>(largest, 1000);
}

// The elements of a block on a second moment's diagonal, like a pointer to the first of them, times a factor.
struct Corner {
    const SecondMoment& moment;
    Index first;
    double factor;
    double operator[](Index i) const noexcept { return moment.at(first + i / block, first + i % block) * factor; }
};

// Rows from k on by columns from `begin` on, both the beginnings of blocks, times a factor.
template <class Real>
void pack(Strips<Real>& strips, const SecondMoment& h, Index k, Index begin, double factor) noexcept {
    const Index depth = std::min(block, h.size() - k), width = std::min(block, h.size() - begin);
    if (k > begin)
        strips.pack(Scaled{h.below().row(k) + begin, factor}, h.below().row_stride, 1, depth, width);
    else if (k < begin)
        strips.pack(Scaled{h.below().row(begin) + k, factor}, 1, h.below().row_stride, depth, width);
    else
        strips.pack(Corner{h, k, factor}, block, 1, depth, width);
}

// A block of columns of some rows, in the order of a second moment's places, from `begin` on.
struct Gathered {
    const float* rows;
    Index row_stride;
    const SecondMoment& moment;
    Index begin;
    float operator[](Index i) const noexcept { return rows[i / block * row_stride + moment.column(begin + i % block)]; }
};

// W, rotated, or W - Q where there is a Q, rounded to float32.
struct Difference {
    MatrixView<const float> w;
    const Rotation& rotation;
    std::optional<PackedMatrix> q;

    Difference(MatrixView<const float> from, const Rotation& turn, const std::optional<PackedMatrix>& less = {}) : w(from), rotation(turn), q(less) {
        if (rotation) rotation.check_columns(w.cols);
        check(!q || (q->codes.rows == w.rows && q->codes.cols * 2 == w.cols), "two matrices that are to be subtracted differ in shape");
    }

    // A row.
    void copy(Index row, float* to) const {
        const RotatedRows rotated(w, rotation, row, 1);
        const float* from = rotated.row(row);
        if (!q) {
            std::copy_n(from, w.cols, to);
            return;
        }
        dequantize(q->format, {q->codes.row(row), 1, q->codes.cols, 0}, {q->scales.row(row), 1, q->scales.cols, 0}, q->tensor_scale, {to, 1, w.cols, 0}, 1);
        for (Index c = 0; c < w.cols; ++c) to[c] = from[c] - to[c];
    }
};

template <class Real>
double scale_of(const Difference& e, int threads) {
    std::vector<float> largest(static_cast<std::size_t>(e.w.rows), 0.0f);
    parallel_for_ranges(std::is_same_v<Real, float> ? e.w.rows : 0, lanes, threads, [&](Index first, Index last) {
        const Buffer<float> values(e.w.cols);
        for (Index r = first; r < last; ++r) {
            e.copy(r, values.data());
            largest[static_cast<std::size_t>(r)] = group_amax(values.data(), e.w.cols);
        }
    });
    return unit_scale<Real>(largest.empty() ? 0 : *std::max_element(largest.begin(), largest.end()), 126);
}

// A matrix as tiles of 32 rows, times a power of two: its row row_at(r) in place of row r, its column c at places[c].
template <class Real, class RowAt>
std::vector<Tile<Real>> tiles_of(const Difference& e, RowAt&& row_at, const std::vector<Index>& places, Index first_tile, Index count, double scale) {
    std::vector<Tile<Real>> tiles(static_cast<std::size_t>(count), Tile<Real>::Zero(lanes, e.w.cols));
    const Buffer<float> values(lanes * e.w.cols);
    for (Index t = 0; t < count; ++t) {
        const Index first = (first_tile + t) * lanes, rows = std::min(lanes, e.w.rows - first);
        for (Index r = 0; r < rows; ++r) e.copy(row_at(first + r), values.data() + r * e.w.cols);
        Tile<Real>& tile = tiles[static_cast<std::size_t>(t)];
        rows_to_lanes(MatrixView<const float>{values.data(), rows, e.w.cols, e.w.cols}, 0, tile.data(), [&](Index c) { return places[static_cast<std::size_t>(c)]; });
        tile *= static_cast<Real>(scale);
    }
    return tiles;
}

// Σ sums ∘ x over columns [begin, begin + width) of x, in float64.
template <class Real>
double dot(const Tile<Real>& sums, const Tile<Real>& x, Index begin, Index width) {
    Lane<double> total = Lane<double>::Zero();
    for (Index c = 0; c < width; ++c) total += sums.col(c).array().template cast<double>() * x.col(begin + c).array().template cast<double>();
    return total.sum();
}

// Sums of sum_of_band(first_tile, count, sums), which fills in one number for each tile, over all tiles of `rows` rows.
template <class Real, class SumOfBand>
double sum_of_tiles(Index rows, int threads, SumOfBand&& sum_of_band) {
    const Index tiles = (rows + lanes - 1) / lanes;
    std::vector<double> sums(static_cast<std::size_t>(tiles), 0.0);
    parallel_for_ranges(tiles, band_size<Real>(tiles, threads), threads, [&](Index first, Index last) { sum_of_band(first, last - first, sums.data() + first); });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

template <class Real>
std::vector<double> quadratic_forms(MatrixView<const float> w, const std::vector<PackedMatrix>& q, const SecondMoment& h, int threads, const Rotation& rotation) {
    check(h.square_of(w.cols), "hessian has shape (" + std::to_string(h.below().rows) + ", " + std::to_string(h.below().cols) + "); a matrix of " + std::to_string(w.cols) + " columns needs (" +
                                   std::to_string(w.cols) + ", " + std::to_string(w.cols) + ")");
    const Index n = w.cols, tiles = (w.rows + lanes - 1) / lanes, forms = static_cast<Index>(q.size()) + 1;
    std::vector<Difference> of{{w, rotation}};
    for (const PackedMatrix& less : q) of.emplace_back(w, rotation, less);
    const double of_h = scale_of<Real>(h);
    std::vector<double> of_e;
    for (const Difference& e : of) of_e.push_back(scale_of<Real>(e, threads));
    const std::vector<Index> places = h.places();
    std::vector<double> sums(static_cast<std::size_t>(forms * tiles), 0.0);  // by form, by tile
    parallel_for_ranges(tiles, std::max<Index>(band_size<Real>(tiles, threads) / forms, 1), threads, [&](Index first_tile, Index last_tile) {
        const Index count = last_tile - first_tile;
        std::vector<Tile<Real>> x;
        for (std::size_t f = 0; f < of.size(); ++f)
            for (auto& tile : tiles_of<Real>(of[f], [](Index r) { return r; }, places, first_tile, count, of_e[f])) x.push_back(std::move(tile));
        Strips<Real> strips;
        std::vector<Tile<Real>> products(x.size(), Tile<Real>(lanes, block));
        // H is symmetric: what lies below the diagonal square of a block of columns counts twice.
        for (Index begin = 0; begin < n; begin += block) {
            const Index width = std::min(block, n - begin);
            for (auto& product : products) product.setZero();
            for (Index k = begin + width; k < n; k += block) {
                pack(strips, h, k, begin, of_h);
                strips.multiply_tiles(x.size(), width, [&](std::size_t t) { return x[t].col(k).data(); }, [&](std::size_t t) { return products[t].data(); });
            }
            pack(strips, h, begin, begin, of_h);
            for (std::size_t t = 0; t < x.size(); ++t) {
                products[t] *= 2;
                strips.multiply(x[t].col(begin).data(), 0, width, width, products[t].data());
                const Index form = static_cast<Index>(t) / count, tile = first_tile + static_cast<Index>(t) % count;
                sums[static_cast<std::size_t>(form * tiles + tile)] += dot(products[t], x[t], begin, width);
            }
        }
    });
    std::vector<double> results;
    for (std::size_t f = 0; f < of.size(); ++f) {
        const auto mine = sums.begin() + static_cast<Index>(f) * tiles;
        results.push_back(std::accumulate(mine, mine + tiles, 0.0) / of_e[f] / of_e[f] / of_h);
    }
    return results;
}

template <class Real>
double coupled_form(MatrixView<const float> w, const std::optional<PackedMatrix>& q, const SecondMoment& a, const SecondMoment& h, int threads, const Rotation& rotation) {
    check(a.square_of(w.rows) && h.square_of(w.cols), "coupled_form: the second moments of outputs and inputs do not have the rows and columns of the errors");
    const Index rows = w.rows, n = w.cols;
    const Difference e(w, rotation, q);
    const double of_e = scale_of<Real>(e, threads), of_a = scale_of<Real>(a), of_h = scale_of<Real>(h);
    const std::vector<Index> places = h.places();
    const double sum = sum_of_tiles<Real>(rows, threads, [&](Index first_tile, Index count, double* sums) {
        const std::vector<Tile<Real>> x = tiles_of<Real>(e, [&](Index r) { return a.column(r); }, places, first_tile, count, of_e);
        std::vector<Tile<Real>> mixed(x.size(), Tile<Real>::Zero(lanes, (n + kernel_cols - 1) / kernel_cols * kernel_cols));  // A E
        Strips<Real> strips;
        std::vector<Tile<Real>> weights(x.size(), Tile<Real>(lanes, block));  // of A, symmetric: its rows are its columns
        const Buffer<float> values(block * n);
        for (Index k = 0; k < rows; k += block) {
            const Index depth = std::min(block, rows - k);
            for (std::size_t t = 0; t < x.size(); ++t) {
                const Index first_row = (first_tile + static_cast<Index>(t)) * lanes, here = std::min(lanes, rows - first_row);
                weights[t].setZero();
                for (Index r = 0; r < depth; ++r)
                    for (Index i = 0; i < here; ++i) weights[t](i, r) = static_cast<Real>(a.at(k + r, first_row + i) * of_a);
            }
            for (Index r = 0; r < depth; ++r) {
                e.copy(a.column(k + r), values.data() + r * n);
                for (Index c = 0; c < n; ++c) values.data()[r * n + c] *= static_cast<float>(of_e);
            }
            for (Index begin = 0; begin < n; begin += block) {
                const Index width = std::min(block, n - begin);
                strips.pack(Gathered{values.data(), n, h, begin}, block, 1, depth, width);
                strips.multiply_tiles(x.size(), width, [&](std::size_t t) { return weights[t].data(); }, [&](std::size_t t) { return mixed[t].col(begin).data(); });
            }
        }
        std::vector<Tile<Real>> products(x.size(), Tile<Real>(lanes, block));
        for (Index begin = 0; begin < n; begin += block) {
            const Index width = std::min(block, n - begin);
            for (auto& product : products) product.setZero();
            for (Index k = 0; k < n; k += block) {
                pack(strips, h, k, begin, of_h);
                strips.multiply_tiles(x.size(), width, [&](std::size_t t) { return mixed[t].col(k).data(); }, [&](std::size_t t) { return products[t].data(); });
            }
            for (std::size_t t = 0; t < x.size(); ++t) sums[t] += dot(products[t], x[t], begin, width);
        }
    });
    return sum / of_e / of_e / of_a / of_h;
}

double diagonal_form(MatrixView<const float> w, MatrixView<const double> d, int threads, const Rotation& rotation) {
    if (rotation) rotation.check_columns(w.cols);
    check(d.rows == 1 && d.cols == w.cols, "diagonal_form: the diagonal does not have the columns of the matrix");
    std::vector<double> rows(static_cast<std::size_t>(w.rows));
    parallel_for_ranges(w.rows, lanes, threads, [&](Index begin, Index end) {
        const RotatedRows rotated(w, rotation, begin, end - begin);
        for (Index r = begin; r < end; ++r) {
            Lane<double> sum = Lane<double>::Zero();
            for (Index c = 0; c < w.cols; ++c) {
                const double value = rotated.row(r)[c];
                sum[c % lanes] += d.data[c] * value * value;
            }
            rows[static_cast<std::size_t>(r)] = sum.sum();
        }
    });
    return std::accumulate(rows.begin(), rows.end(), 0.0);
}

template std::vector<double> quadratic_forms<float>(MatrixView<const float>, const std::vector<PackedMatrix>&, const SecondMoment&, int, const Rotation&);
template std::vector<double> quadratic_forms<double>(MatrixView<const float>, const std::vector<PackedMatrix>&, const SecondMoment&, int, const Rotation&);
template double coupled_form<float>(MatrixView<const float>, const std::optional<PackedMatrix>&, const SecondMoment&, const SecondMoment&, int, const Rotation&);
template double coupled_form<double>(MatrixView<const float>, const std::optional<PackedMatrix>&, const SecondMoment&, const SecondMoment&, int, const Rotation&);

}  // namespace mrgptq
