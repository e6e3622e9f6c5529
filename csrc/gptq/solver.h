// GPTQ: visits columns in a factor's order, rounds each to its group's grid and feeds the error forward to the columns not yet visited. Scales are given, or chosen where their group is
// reached by what they would lose; rounds of refinement may follow.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/matrix_view.h"
#include "codecs/scale_rule.h"
#include "gptq/factor.h"
#include "rotations/rotation.h"

namespace mrgptq {

#ifdef MRGPTQ_CHECKS
inline constexpr bool always_prove_rounds = true;
#else
inline constexpr bool always_prove_rounds = false;
#endif

struct SolverOptions {
    Precision precision = Precision::float64;
    // Choose each group's scale when the group is reached: of the storable scales around absmax (by `mx`) of what its weights have become by then, the one with the least
    // Σ pivot (t - q)² over the group; the smaller scale on a tie. Needs Order::group.
    bool search_scales = false;
    MxRule mx = MxRule::even;
    int rounds = 0;  // of refinement, see refine.h; needs Order::group
    // After each round, that it raised the loss by no more than refinement_slack(); solve() throws where one did. Losses that are not finite, where feedback outgrew the precision, tell whoever asked to take
    // another, so of those nothing is proved.
    bool prove_rounds = always_prove_rounds;
};

// Losses Σ (w-q)ᵀ (H + λI) (w-q) over all rows, summed in float64, where a dead column counts with weight Factor::dead_weight(): after the solver, then after each round carried out.
// Rounds end early where one changes nothing.
struct SolverResult {
    std::vector<double> losses;
};

// weight (rows, cols) float32, by the rotation in the basis of the factor's H, scales (rows, cols / group) read unless searched and written where searched or refined, codes (rows, cols / 2) written.
// Without `outputs` rows are independent. With it, the factor of the outputs' second moment A (rows, rows) in any order, the loss is tr(A E H Eᵀ) and a block of rows makes up for the blocks
// solved before it (outputs.h); SolverResult's losses are then those against the targets that the rows were given.
// Cut into tiles by the number of rows alone: the same bytes for any number of threads.
SolverResult solve(std::string_view format, MatrixView<const float> weight, MatrixView<std::uint8_t> scales, float tensor_scale, const Factor& factor, const Factor* outputs,
                   const SolverOptions& options, MatrixView<std::uint8_t> codes, int threads, const Rotation& rotation = {});

}  // namespace mrgptq
