#include "gptq/refine.h"

#include <algorithm>
#include <limits>

#include "codecs/scale_rule.h"

namespace mrgptq {
namespace {

// One scale's best answer for a group. All arrays hold the group's columns by position.
template <class Format, class Real>
struct Candidate {
    GroupTile<Real, Format> value;     // q
    GroupTile<Real, Format> rounded;   // q / step, E2M1 values
    GroupTile<Real, Format> change;    // d = q_old - q
    GroupTile<Real, Format> gradient;  // P_g + d R_gg
    Lane<Real> delta;                  // change of the loss
};

template <class Format, class Real>
void try_steps(const Lane<float>& steps, const GroupTile<Real, Format>& target, const GroupTile<Real, Format>& old, const GroupTile<Real, Format>& gradient, const GroupFactors<Real>& factors,
               Index first, Candidate<Format, Real>& out) {
    constexpr Index size = Format::group_size;
    const auto round_column = [&](Index j, const Lane<Real>& t) {
        for (Index r = 0; r < lanes; ++r) {
            out.rounded(r, j) = round_signed(t[r] / static_cast<Real>(steps[r]));
            out.value(r, j) = value_of(steps[r], out.rounded(r, j));
        }
    };
    for (Index j = size - 1; j >= 0; --j) {
        Lane<Real> t = target.col(j).array();
        for (Index i = j + 1; i < size; ++i) t += factors.unit(i, first + j) * (target.col(i) - out.value.col(i)).array();
        round_column(j, t);
    }
    out.change = old - out.value;
    out.gradient = gradient;
    for (Index i = 0; i < size; ++i)
        for (Index j = 0; j < size; ++j) out.gradient.col(j) += factors.gram(i, first + j) * out.change.col(i);
    for (Index j = size - 1; j >= 0; --j) {
        const Lane<Real> before = out.value.col(j).array();
        round_column(j, before + out.gradient.col(j).array() / factors.diagonal[first + j]);
        const Lane<Real> step = before - out.value.col(j).array();
        out.change.col(j) += step.matrix();
        for (Index i = 0; i < size; ++i) out.gradient.col(i) += factors.gram(j, first + i) * step.matrix();
    }
    out.delta.setZero();
    for (Index j = 0; j < size; ++j) out.delta += out.change.col(j).array() * (gradient.col(j) + out.gradient.col(j)).array();
}

// ŵ_g + P_g R_gg⁻¹ by the factor of R_gg: two triangular solves.
template <class Format, class Real>
GroupTile<Real, Format> unconstrained(const GroupTile<Real, Format>& old, const GroupTile<Real, Format>& gradient, const GroupFactors<Real>& factors, Index first) {
    constexpr Index size = Format::group_size;
    GroupTile<Real, Format> x = gradient;
    for (Index j = 0; j < size; ++j)
        for (Index i = 0; i < j; ++i) x.col(j) -= factors.unit(j, first + i) * x.col(i);
    for (Index j = 0; j < size; ++j) x.col(j) /= factors.pivots[first + j];
    for (Index j = size - 1; j >= 0; --j)
        for (Index i = j + 1; i < size; ++i) x.col(j) -= factors.unit(i, first + j) * x.col(i);
    return old + x;
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
double refine_block(RowTile<Real>& tile, const Factor& factor, const Strips<Real>& own, const GroupFactors<Real>& factors, float tensor_scale, Index begin, Index end, Tile<Real>& p) {
    constexpr Index size = Format::group_size;
    Candidate<Format, Real> candidate, best;
    double fall = 0;
    for (Index first = end - size; first >= begin; first -= size) {
        const Index group = factor.column(first) / size;
        const GroupTile<Real, Format> slope = p.middleCols(first - begin, size);
        GroupTile<Real, Format> old;
        for (Index j = 0; j < size; ++j)
            for (Index r = 0; r < lanes; ++r) old(r, j) = value_of(tile.steps(r, group), static_cast<Real>(0.5) * tile.halves(r, first + j));
        const GroupTile<Real, Format> target = unconstrained<Format, Real>(old, slope, factors, first);

        Lane<std::uint8_t> best_scales = tile.scales.col(group).array();
        best.delta.setZero();  // what standing still changes
        best.change.setZero();
        best.value = old;
        for (Index j = 0; j < size; ++j) best.rounded.col(j) = static_cast<Real>(0.5) * tile.halves.col(first + j).template cast<Real>();
        for (int offset = -1; offset <= 1; ++offset) {
            Lane<std::uint8_t> scales;
            Lane<float> steps;
            for (Index r = 0; r < lanes; ++r) {
                scales[r] = moved_scale<Format>(tile.scales(r, group), offset, tensor_scale);
                steps[r] = group_step<Format>(scales[r], tensor_scale);
            }
            try_steps<Format, Real>(steps, target, old, slope, factors, first, candidate);
            // Equal values under another scale tie, whatever rounding made of them on the way.
            Lane<Real> apart = Lane<Real>::Zero();
            for (Index j = 0; j < size; ++j) apart += (candidate.value.col(j) - best.value.col(j)).array().abs();
            Lane<Real> better;  // a mask in Real keeps the selects below in one vector width
            for (Index r = 0; r < lanes; ++r) better[r] = candidate.delta[r] < best.delta[r] && apart[r] > 0;
            if (!(better > 0).any()) continue;
            for (Index r = 0; r < lanes; ++r) {
                best_scales[r] = better[r] > 0 ? scales[r] : best_scales[r];
                best.delta[r] = better[r] > 0 ? candidate.delta[r] : best.delta[r];
            }
            for (Index j = 0; j < size; ++j)
                for (Index r = 0; r < lanes; ++r) {
                    best.change(r, j) = better[r] > 0 ? candidate.change(r, j) : best.change(r, j);
                    best.rounded(r, j) = better[r] > 0 ? candidate.rounded(r, j) : best.rounded(r, j);
                    best.value(r, j) = better[r] > 0 ? candidate.value(r, j) : best.value(r, j);
                }
        }
        p.middleCols(first - begin, size) = best.change;
        if (!(best.delta < 0).any()) continue;
        fall -= best.delta.template cast<double>().sum();
        tile.scales.col(group) = best_scales.matrix();
        for (Index r = 0; r < lanes; ++r) tile.steps(r, group) = group_step<Format>(best_scales[r], tensor_scale);
        tile.halves.middleCols(first, size) = (Real(2) * best.rounded).template cast<std::int8_t>();
        tile.error.middleCols(first, size) += best.change;
        if (first > begin) own.multiply(best.change.data(), first - begin, size, first - begin, p.data());
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
template double refine_block<Mxfp4, float>(RowTile<float>&, const Factor&, const Strips<float>&, const GroupFactors<float>&, float, Index, Index, Tile<float>&);
template double refine_block<Mxfp4, double>(RowTile<double>&, const Factor&, const Strips<double>&, const GroupFactors<double>&, float, Index, Index, Tile<double>&);
template double refine_block<Nvfp4, float>(RowTile<float>&, const Factor&, const Strips<float>&, const GroupFactors<float>&, float, Index, Index, Tile<float>&);
template double refine_block<Nvfp4, double>(RowTile<double>&, const Factor&, const Strips<double>&, const GroupFactors<double>&, float, Index, Index, Tile<double>&);
template double refinement_slack<float>(const Tile<float>&, const Tile<float>&, const Tile<float>&, const Factor&, Index, int);
template double refinement_slack<double>(const Tile<double>&, const Tile<double>&, const Tile<double>&, const Factor&, Index, int);
template double damped_loss<float>(const Tile<float>&, const Factor&);
template double damped_loss<double>(const Tile<double>&, const Factor&);

}  // namespace mrgptq
