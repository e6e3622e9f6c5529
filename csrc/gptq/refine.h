// Block coordinate descent on the damped loss: group after group gets the scale and the codes that lose least while all others stand still.
//
// With E = W - Ŵ, R = H + λI and P = E R, changing a group's errors by d changes a row's loss by  d · (2 P_g + d R_gg) = d · (P_g + P_g'),  P_g' = P_g + d R_gg.  For the present scale and
// its storable neighbours the group's codes are found by GPTQ's recursion inside the group, from the values ŵ_g + P_g R_gg⁻¹ that would be best if there were no grid, and mended by one
// sweep of coordinate descent; the candidate with the least change is taken if that is below zero. So a round never increases the loss but by rounding.
#pragma once

#include <algorithm>

#include "gptq/factor.h"
#include "gptq/tile.h"

namespace mrgptq {

// What refinement knows of each group before it sees a row: the factor of R_gg, all groups packed side by side by position.
template <class Real>
struct GroupFactors {
    Columns<Real> unit;                                // (group_size, cols): group at position p in columns p ... p + group_size - 1, unit lower
    Eigen::Matrix<Real, Eigen::Dynamic, 1> pivots;     // (cols): squared diagonal of the factor
    Columns<Real> gram;                                // (group_size, cols): R_gg
    Eigen::Matrix<Real, Eigen::Dynamic, 1> diagonal;   // (cols): R's
};
template <class Real>
GroupFactors<Real> group_factors(const Factor& factor, Index group_size);

// Calls use(strips, first) for pieces of R's columns [begin, end), rows from `first` on, which together make them up: above the block, the block itself, which is left in `own`
// too, and below it. R stands above the diagonal of Factor::unit, and R is symmetric.
template <class Real, Index across, class Use>
void for_moment_pieces(const Factor& factor, Index begin, Index end, Strips<Real, across>& strips, Strips<Real>& own, Use&& use) {
    const auto unit = factor.unit();
    const Index n = unit.cols(), width = end - begin;
    for (Index k = 0; k < begin; k += block) {
        const Index depth = std::min(block, begin - k);
        strips.pack(&unit.coeffRef(k, begin), 1, unit.outerStride(), depth, width);
        use(strips, k);
    }
    Columns<double> square = unit.block(begin, begin, width, width).template triangularView<Eigen::StrictlyUpper>();
    square += square.transpose().eval();
    square.diagonal() = factor.diagonal().segment(begin, width);
    own.pack(square.data(), 1, width, width, width);
    strips.pack(square.data(), 1, width, width, width);
    use(strips, begin);
    for (Index k = end; k < n; k += block) {
        const Index depth = std::min(block, n - k);
        strips.pack(&unit.coeffRef(begin, k), unit.outerStride(), 1, depth, width);
        use(strips, k);
    }
}

// One block's share of a round: its groups in visiting order, given P of its columns, in whose place d is left, zero where nothing moved. `own` is R's own square of the block. Returns how much
// the damped loss of the tile's rows fell, summed in float64.
template <class Format, class Real>
double refine_block(RowTile<Real>& tile, const Factor& factor, const Strips<Real>& own, const GroupFactors<Real>& factors, const StepTable& table, Index begin, Index end, Tile<Real>& p);

// By how much rounding alone may raise the loss of a tile whose errors went from `before` to `after` in its given round, from 1 on: 4 γ Σ (|e| + |e'|) |R| hᵀ with γ = m u / (1 - m u),
// m = cols + (round - 1) (cols / group_size + 1) + 2 group_size + 8, and h, the history, the magnitudes of all that P was ever made of: |e| before the first round plus |d| of every round, this
// one's too. A term of P meets a sum of cols products in the first round; in each later one a sum for every group that moved, and E, of which P is to be the gradient, is rounded when it takes
// d; two group updates and a few operations follow. So P + P' is off by 2 γ h |R|, and each group moves once a round, hence |d| <= |e| + |e'|. What else is rounded, the sum of d (P + P') over a
// group and e' = e - w + q itself, takes fewer than m operations more, for which the other half of the 4 stands.
template <class Real>
double refinement_slack(const Tile<Real>& before, const Tile<Real>& after, const Tile<Real>& history, const Factor& factor, Index group_size, int round);

// e R eᵀ summed over the tile's rows, in float64.
template <class Real>
double damped_loss(const Tile<Real>& error, const Factor& factor);

}  // namespace mrgptq
