// One group of weights -> the stored scale of that group, by a named rule (formulas: each function's comment).
//
// Two choices make a rule. A *search* decides which magnitude should map to 6, the largest code: the group's own largest (absmax), or a shrunk one that clips a little (fpquant_mse).
// The *MX rule* says how that magnitude becomes a power of two; NVFP4 rounds it to E4M3 and needs none.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/matrix_view.h"
#include "formats/block_format.h"

namespace mrgptq {

enum class ScaleSearch { absmax, fpquant_mse };
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

template <class Format>
std::uint8_t group_scale(const float* group, const ScaleRule& rule, float tensor_scale) noexcept;

}  // namespace mrgptq
