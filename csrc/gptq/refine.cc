#include "gptq/refine.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <type_traits>

namespace mrgptq {
namespace {

// The rows of a tile that are refined together: two vectors a column, so that a column's sums stay in registers.
template <class Real>
inline constexpr Index slice = kernel_rows<Real>;
static_assert(lanes % slice<float> == 0 && lanes % slice<double> == 0);

template <class Real>
struct Pair {
    Vector<Real> low, high;

    void add_product(Real weight, const Pair& x) noexcept {
        low += weight * x.low;
        high += weight * x.high;
    }
};
template <class Real>
Pair<Real> operator+(const Pair<Real>& a, const Pair<Real>& b) noexcept { return {a.low + b.low, a.high + b.high}; }
template <class Real>
Pair<Real> operator-(const Pair<Real>& a, const Pair<Real>& b) noexcept { return {a.low - b.low, a.high - b.high}; }
template <class Real>
Pair<Real> operator*(const Pair<Real>& a, const Pair<Real>& b) noexcept { return {a.low * b.low, a.high * b.high}; }
template <class Real>
Pair<Real> operator/(const Pair<Real>& a, Real b) noexcept { return {a.low / b, a.high / b}; }

// A group's columns, by position, of a slice.
template <class Format, class Real>
using Slice = std::array<Pair<Real>, static_cast<std::size_t>(Format::group_size)>;

template <class Format, class Real>
Slice<Format, Real> load_slice(const Real* from) noexcept {
    Slice<Format, Real> to;
    for (auto& column : to) {
        column = {load(from), load(from + vector_size<Real>)};
        from += lanes;
    }
    return to;
}

// round_signed() and value_of() of a vector.
template <class Real>
Vector<Real> round_signed(Vector<Real> t) noexcept {
    typedef std::conditional_t<sizeof(Real) == 4, std::uint32_t, std::uint64_t> Bits __attribute__((vector_size(vector_bytes)));
    const Bits sign = (Bits)t & (Bits)splat(Real(-0.0));
    const Vector<Real> magnitude = (Vector<Real>)((Bits)t ^ sign), anchor = magnitude < Real(2) ? splat(e2m1::anchor<Real> / 2) : magnitude < Real(4) ? splat(e2m1::anchor<Real>) : splat(2 * e2m1::anchor<Real>);
    const Vector<Real> nearest = (magnitude + anchor) - anchor;
    return (Vector<Real>)((Bits)(nearest < Real(6) ? nearest : splat(Real(6))) | sign);
}
template <class Real>
Vector<Real> value_of(Vector<Real> step, Vector<Real> e2m1_value) noexcept {
    const Vector<Real> product = step * e2m1_value;  // in double exact
    if constexpr (std::is_same_v<Real, float>) {
        return product;
    } else {
        typedef float Narrow __attribute__((vector_size(vector_bytes / 2)));
        return __builtin_convertvector(__builtin_convertvector(product, Narrow), Vector<Real>);
    }
}

// One scale's answer for a group.
template <class Format, class Real>
struct Candidate {
    std::array<std::uint8_t, slice<Real>> scales;
    Pair<Real> steps;
    Slice<Format, Real> rounded;   // q / step, E2M1 values
    Slice<Format, Real> change;    // d = q_old - q
    Slice<Format, Real> gradient;  // P_g + d R_gg
    Slice<Format, Real> gap;       // what the recursion leaves of its target, then what the sweep takes off q
    Pair<Real> delta;              // change of the loss

    Pair<Real> value(std::size_t j) const noexcept { return {value_of<Real>(steps.low, rounded[j].low), value_of<Real>(steps.high, rounded[j].high)}; }

    // Column j on the grid, where t would be best.
    void round_column(std::size_t j, const Pair<Real>& t) noexcept { rounded[j] = {round_signed<Real>(t.low / steps.low), round_signed<Real>(t.high / steps.high)}; }
};

// The three scales side by side: their chains of sums are long and do not wait for each other.
template <class Format, class Real>
using Candidates = std::array<Candidate<Format, Real>, 3>;

template <class Format, class Real>
void find_values(Candidates<Format, Real>& candidates, const Slice<Format, Real>& target, const Slice<Format, Real>& old, const Slice<Format, Real>& gradient, const GroupFactors<Real>& factors,
                 Index first) noexcept {
    constexpr std::size_t size = Format::group_size;
    const Real *unit = factors.unit.col(first).data(), *gram = factors.gram.col(first).data();  // column after column
    std::array<Pair<Real>, 3> sums;
    for (std::size_t j = size; j-- > 0;) {
        sums.fill(target[j]);
        for (std::size_t i = j + 1; i < size; ++i)
#pragma GCC unroll 3
            for (std::size_t c = 0; c < 3; ++c) sums[c].add_product(unit[j * size + i], candidates[c].gap[i]);
#pragma GCC unroll 3
        for (std::size_t c = 0; c < 3; ++c) {
            auto& candidate = candidates[c];
            candidate.round_column(j, sums[c]);
            const Pair<Real> value = candidate.value(j);
            candidate.gap[j] = target[j] - value;
            candidate.change[j] = old[j] - value;
        }
    }
    constexpr std::size_t few = 4;
    for (auto& candidate : candidates)
        for (std::size_t j = 0; j < size; j += few) {
            std::array<Pair<Real>, few> g;
#pragma GCC unroll 4
            for (std::size_t k = 0; k < few; ++k) g[k] = gradient[j + k];
            for (std::size_t i = 0; i < size; ++i)
#pragma GCC unroll 4
                for (std::size_t k = 0; k < few; ++k) g[k].add_product(gram[(j + k) * size + i], candidate.change[i]);
#pragma GCC unroll 4
            for (std::size_t k = 0; k < few; ++k) candidate.gradient[j + k] = g[k];
        }
    // A column's gradient takes the sweep's steps in their order: those to its right before its turn, its own and those to its left at the end.
    for (std::size_t j = size; j-- > 0;) {
#pragma GCC unroll 3
        for (std::size_t c = 0; c < 3; ++c) sums[c] = candidates[c].gradient[j];
        for (std::size_t i = size; --i > j;)
#pragma GCC unroll 3
            for (std::size_t c = 0; c < 3; ++c) sums[c].add_product(gram[j * size + i], candidates[c].gap[i]);
#pragma GCC unroll 3
        for (std::size_t c = 0; c < 3; ++c) {
            auto& candidate = candidates[c];
            const Pair<Real> before = candidate.value(j);
            candidate.gradient[j] = sums[c];
            candidate.round_column(j, before + sums[c] / factors.diagonal[first + static_cast<Index>(j)]);
            candidate.gap[j] = before - candidate.value(j);
            candidate.change[j] = candidate.change[j] + candidate.gap[j];
        }
    }
    for (auto& candidate : candidates) candidate.delta = Pair<Real>{};
    for (std::size_t j = 0; j < size; ++j) {
#pragma GCC unroll 3
        for (std::size_t c = 0; c < 3; ++c) sums[c] = candidates[c].gradient[j];
        for (std::size_t i = j + 1; i-- > 0;)
#pragma GCC unroll 3
            for (std::size_t c = 0; c < 3; ++c) sums[c].add_product(gram[j * size + i], candidates[c].gap[i]);
#pragma GCC unroll 3
        for (std::size_t c = 0; c < 3; ++c) candidates[c].delta = candidates[c].delta + candidates[c].change[j] * (gradient[j] + sums[c]);
    }
}

// Gives each row of a slice the candidate that loses least, if it loses less than standing still; `change` becomes what that took off q. Returns what it changes of the loss.
template <class Format, class Real>
Pair<Real> take_best(const Candidates<Format, Real>& candidates, const Slice<Format, Real>& old, RowTile<Real>& tile, Index row, Index group, Index first, Slice<Format, Real>& change) noexcept {
    constexpr std::size_t size = Format::group_size;
    std::array<std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>, slice<Real>> rows;
    std::uint8_t* const scales = tile.scales.col(group).data() + row;
    float* const steps = tile.steps.col(group).data() + row;
    std::array<Real, slice<Real>> tried;
    Slice<Format, Real> value = old, rounded;
    Pair<Real> least{};  // what standing still changes
    change.fill(Pair<Real>{});
    for (std::size_t j = 0; j < size; ++j) {
        std::array<Real, slice<Real>> now;
        for (std::size_t r = 0; r < now.size(); ++r) now[r] = static_cast<Real>(0.5) * tile.halves(row + static_cast<Index>(r), first + static_cast<Index>(j));
        std::memcpy(&rounded[j], now.data(), sizeof(now));
    }
    for (const Candidate<Format, Real>& candidate : candidates) {
        // Equal values under another scale tie, whatever rounding made of them on the way.
        Pair<Real> other = candidate.value(0);
        auto low = value[0].low != other.low, high = value[0].high != other.high;
        for (std::size_t j = 1; j < size; ++j) {
            other = candidate.value(j);
            low |= value[j].low != other.low;
            high |= value[j].high != other.high;
        }
        low &= candidate.delta.low < least.low;
        high &= candidate.delta.high < least.high;
        const auto better = [&](const Pair<Real>& than, const Pair<Real>& is) { return Pair<Real>{low ? is.low : than.low, high ? is.high : than.high}; };
        least = better(least, candidate.delta);
        for (std::size_t j = 0; j < size; ++j) {
            value[j] = better(value[j], candidate.value(j));
            change[j] = better(change[j], candidate.change[j]);
            rounded[j] = better(rounded[j], candidate.rounded[j]);
        }
        const std::array masks{low, high};
        static_assert(sizeof(rows) == sizeof(masks));
        std::memcpy(rows.data(), masks.data(), sizeof(rows));
        std::memcpy(tried.data(), &candidate.steps, sizeof(tried));
        for (std::size_t r = 0; r < rows.size(); ++r) {
            scales[r] = rows[r] != 0 ? candidate.scales[r] : scales[r];
            steps[r] = rows[r] != 0 ? static_cast<float>(tried[r]) : steps[r];
        }
    }
    for (std::size_t j = 0; j < size; ++j) {
        const Index column = first + static_cast<Index>(j);
        std::memcpy(tried.data(), &rounded[j], sizeof(tried));
        std::int8_t* const halves = tile.halves.col(column).data() + row;
        for (std::size_t r = 0; r < tried.size(); ++r) halves[r] = static_cast<std::int8_t>(Real(2) * tried[r]);
        Real* const error = tile.error.col(column).data() + row;
        store<Real>(error, load(error) + change[j].low);
        store<Real>(error + vector_size<Real>, load(error + vector_size<Real>) + change[j].high);
    }
    return least;
}

// ŵ_g + P_g R_gg⁻¹ by the factor of R_gg: two triangular solves.
template <class Format, class Real>
Slice<Format, Real> unconstrained(const Slice<Format, Real>& old, const Slice<Format, Real>& gradient, const GroupFactors<Real>& factors, Index first) noexcept {
    constexpr std::size_t size = Format::group_size;
    const Real *unit = factors.unit.col(first).data(), *pivots = factors.pivots.data() + first;
    Slice<Format, Real> x = gradient;
    for (std::size_t j = 0; j < size; ++j)
        for (std::size_t i = 0; i < j; ++i) x[j].add_product(-unit[i * size + j], x[i]);
    for (std::size_t j = 0; j < size; ++j) x[j] = x[j] / pivots[j];
    for (std::size_t j = size; j-- > 0;)
        for (std::size_t i = j + 1; i < size; ++i) x[j].add_product(-unit[j * size + i], x[i]);
    for (std::size_t j = 0; j < size; ++j) x[j] = old[j] + x[j];
    return x;
}

}  // namespace

template <class Real>
GroupFactors<Real> group_factors(const Factor& factor, Index group_size) {
    const Index n = factor.cols();
    GroupFactors<Real> factors{Columns<Real>(group_size, n), {}, Columns<Real>(group_size, n), factor.diagonal().cast<Real>()};
    factors.pivots.resize(n);
    for (Index p = 0; p < n; p += group_size) {
        Columns<double> gram = factor.unit().block(p, p, group_size, group_size).triangularView<Eigen::StrictlyUpper>();
        gram += gram.transpose().eval();
        gram.diagonal() = factor.diagonal().segment(p, group_size);
        factors.gram.middleCols(p, group_size) = gram.cast<Real>();
        // R could be factorised, so its blocks can; the factor is small and made once, in float64.
        const Eigen::LLT<Columns<double>> llt(gram);
        Columns<double> unit = llt.matrixL();
        const Eigen::VectorXd diagonal = unit.diagonal();
        for (Index j = 0; j < group_size; ++j) unit.col(j) /= diagonal[j];
        factors.unit.middleCols(p, group_size) = unit.cast<Real>();
        factors.pivots.segment(p, group_size) = diagonal.array().square().cast<Real>();
    }
    return factors;
}

template <class Format, class Real>
double refine_block(RowTile<Real>& tile, const Factor& factor, const Strips<Real>& own, const GroupFactors<Real>& factors, const StepTable& table, Index begin, Index end, Tile<Real>& p) {
    constexpr Index size = Format::group_size;
    Candidates<Format, Real> candidates;
    double fall = 0;
    for (Index first = end - size; first >= begin; first -= size) {
        const Index group = factor.column(first) / size;
        Lane<Real> deltas;
        for (Index row = 0; row < lanes; row += slice<Real>) {
            Real* const p_row = p.col(first - begin).data() + row;
            for (int c = 0; c < 3; ++c) {
                Candidate<Format, Real>& candidate = candidates[static_cast<std::size_t>(c)];
                std::array<Real, slice<Real>> steps;
                for (std::size_t r = 0; r < steps.size(); ++r) {
                    candidate.scales[r] = table.moved(tile.scales(row + static_cast<Index>(r), group), c - 1);
                    steps[r] = static_cast<Real>(table[candidate.scales[r]]);
                }
                std::memcpy(&candidate.steps, steps.data(), sizeof(steps));
            }
            GroupTile<Real, Format> now;
            for (Index j = 0; j < size; ++j)
                for (Index r = row; r < row + slice<Real>; ++r) now(r, j) = value_of(tile.steps(r, group), static_cast<Real>(0.5) * tile.halves(r, first + j));
            const Slice<Format, Real> old = load_slice<Format>(now.data() + row), slope = load_slice<Format>(p_row);
            find_values<Format, Real>(candidates, unconstrained<Format, Real>(old, slope, factors, first), old, slope, factors, first);
            Slice<Format, Real> change;
            const Pair<Real> delta = take_best<Format, Real>(candidates, old, tile, row, group, first, change);
            std::memcpy(deltas.data() + row, &delta, sizeof(delta));
            for (std::size_t j = 0; j < change.size(); ++j) std::memcpy(p_row + static_cast<Index>(j) * lanes, &change[j], sizeof(change[j]));
        }
        if (!(deltas < 0).any()) continue;
        fall -= deltas.template cast<double>().sum();
        if (first > begin) own.multiply(p.col(first - begin).data(), first - begin, size, first - begin, p.data());
    }
    return fall;
}

template <class Real>
double refinement_slack(const Tile<Real>& before, const Tile<Real>& after, const Tile<Real>& history, const Factor& factor, Index group_size, int round) {
    const Index n = before.cols();
    const double m = static_cast<double>(n + (round - 1) * (n / group_size + 1) + 2 * group_size + 8) * std::numeric_limits<Real>::epsilon() / 2;
    const Tile<double> e = before.cwiseAbs().template cast<double>() + after.cwiseAbs().template cast<double>(), h = history.template cast<double>();
    const Columns<double> above = factor.unit().cwiseAbs().template triangularView<Eigen::StrictlyUpper>();
    Tile<double> product = e * factor.diagonal().cwiseAbs().asDiagonal();
    product += e * above;
    product += e * above.transpose();
    return 4 * m / (1 - m) * product.cwiseProduct(h).sum();
}

template <class Real>
double damped_loss(const Tile<Real>& error, const Factor& factor) {
    const Tile<double> e = error.template cast<double>();
    Tile<double> product = 2 * e * Columns<double>(factor.unit().template triangularView<Eigen::StrictlyUpper>());
    product += e * factor.diagonal().asDiagonal();
    return product.cwiseProduct(e).sum();
}

template GroupFactors<float> group_factors<float>(const Factor&, Index);
template GroupFactors<double> group_factors<double>(const Factor&, Index);
template double refine_block<Mxfp4, float>(RowTile<float>&, const Factor&, const Strips<float>&, const GroupFactors<float>&, const StepTable&, Index, Index, Tile<float>&);
template double refine_block<Mxfp4, double>(RowTile<double>&, const Factor&, const Strips<double>&, const GroupFactors<double>&, const StepTable&, Index, Index, Tile<double>&);
template double refine_block<Nvfp4, float>(RowTile<float>&, const Factor&, const Strips<float>&, const GroupFactors<float>&, const StepTable&, Index, Index, Tile<float>&);
template double refine_block<Nvfp4, double>(RowTile<double>&, const Factor&, const Strips<double>&, const GroupFactors<double>&, const StepTable&, Index, Index, Tile<double>&);
template double refinement_slack<float>(const Tile<float>&, const Tile<float>&, const Tile<float>&, const Factor&, Index, int);
template double refinement_slack<double>(const Tile<double>&, const Tile<double>&, const Tile<double>&, const Factor&, Index, int);
template double damped_loss<float>(const Tile<float>&, const Factor&);
template double damped_loss<double>(const Tile<double>&, const Factor&);

}  // namespace mrgptq
