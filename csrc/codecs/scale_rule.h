// One group of weights -> the stored scale of that group, by a named rule (formulas: each function's comment).
//
// Two choices make a rule. A *search* decides which magnitude should map to 6, the largest code, or tries the storable scales around absmax one by one.
// The *MX rule* says how a magnitude becomes a power of two; NVFP4 rounds it to E4M3 and needs none. A search over storable scales uses it to know where to begin, and its grid.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/matrix_view.h"
#include "formats/block_format.h"

namespace mrgptq {

// absmax         the group's largest magnitude maps to 6
// fpquant_mse    FP-Quant's search over shrunk magnitudes, unrounded
// mse            of the storable scales around absmax the one with the least Σ err²
// hessian        the same under Σ H_cc err_c²
// hessian_block  the same under errᵀ H_gg err
// four_over_six  NVFP4: the better of mapping the largest magnitude to 6 or to 4
// quest          MXFP4: 2^floor(log2(σ 2.92247856 / 6)) with σ the group's standard deviation; clips
enum class ScaleSearch { absmax, fpquant_mse, mse, hessian, hessian_block, four_over_six, quest };
enum class MxRule { floor, ceil, even, four_thirds };

ScaleSearch scale_search_named(std::string_view name);
MxRule mx_rule_named(std::string_view name);

struct ScaleRule {
    ScaleSearch search = ScaleSearch::absmax;
    MxRule mx = MxRule::even;
    // compressed-tensors divides a bfloat16 activation's amax by 6 in bfloat16; rounding it here too makes fake quantisation answer bit for bit what that loader answers.
    bool bfloat16_sixth = false;
};

// The divisor that a tensor's steps are made with: 3 for four-thirds, whose 4/3 * 2^e is stored as 2^(e+2) / 3, and 1 for the other MX rules.
float mx_tensor_scale(MxRule rule) noexcept;

// 2688 / amax, with the two ends mended: 1 where amax is so small (or zero) that the quotient overflows, and the next larger float where 6 * 448 / g would.
float nvfp4_tensor_scale(float amax) noexcept;

// The largest |x| of `count` values, none of them NaN.
float group_amax(const float* x, Index count) noexcept;

// The second moment H of the group's own columns, for the rules that weigh errors by it: H[i][j] = data[i * stride + j].
struct GroupMoment {
    const double* data = nullptr;
    Index stride = 0;
};

// `moment` is read by hessian and hessian_block alone.
template <class Format>
std::uint8_t group_scale(const float* group, const ScaleRule& rule, float tensor_scale, GroupMoment moment = {}) noexcept;

// How far a search over storable scales goes from absmax, in steps of the stored byte: E4M3 has eight to a power of two.
template <class Format>
struct SearchRange;
template <>
struct SearchRange<Nvfp4> {
    static constexpr int below = 8, above = 7;
};
template <>
struct SearchRange<Mxfp4> {
    static constexpr int below = 2, above = 2;
};

// The stored scale `offset` steps from `bits`, held inside what is positive and decodes with a finite 6 * step.
template <class Format>
std::uint8_t moved_scale(std::uint8_t bits, int offset, float tensor_scale) noexcept;

// Where a search begins for a group whose largest magnitude is `amax`: absmax, but the smallest storable scale where NVFP4's would vanish.
template <class Format>
std::uint8_t search_start(float amax, MxRule mx, float tensor_scale) noexcept;

}  // namespace mrgptq
