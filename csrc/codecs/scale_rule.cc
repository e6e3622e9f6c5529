#include "codecs/scale_rule.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "codecs/shrink.h"

namespace mrgptq {
namespace {

// ---- Searches over storable scales: mse, hessian, hessian_block.

// The offset from `start` whose scale leaves the least error; the smaller scale on a tie. Errors are those of the values that will be read back, summed in float64 in column order.
template <class Format>
std::uint8_t least_error_scale(const float* group, std::uint8_t start, ScaleSearch search, float tensor_scale, GroupMoment moment) noexcept {
    constexpr int count = SearchRange<Format>::below + SearchRange<Format>::above + 1;
    constexpr Index size = Format::group_size;
    std::array<std::uint8_t, count> scales;
    std::array<float, count> steps;
    for (int k = 0; k < count; ++k) {
        scales[k] = moved_scale<Format>(start, k - SearchRange<Format>::below, tensor_scale);
        steps[k] = group_step<Format>(scales[k], tensor_scale);
    }
    std::array<std::array<double, count>, size> errors;
    for (Index c = 0; c < size; ++c) {
        const float magnitude = std::fabs(group[c]);
        const double sign = group[c] < 0 ? -1.0 : 1.0;
        for (int k = 0; k < count; ++k) errors[c][k] = sign * (static_cast<double>(magnitude) - steps[k] * e2m1::round_magnitude(magnitude / steps[k]));
    }
    std::array<double, count> sums{};
    for (Index i = 0; i < size; ++i) {
        if (search == ScaleSearch::hessian_block) {
            std::array<double, count> inner{};
            for (Index j = 0; j < size; ++j)
                for (int k = 0; k < count; ++k) inner[k] += moment.data[i * moment.stride + j] * errors[j][k];
            for (int k = 0; k < count; ++k) sums[k] += errors[i][k] * inner[k];
        } else {
            const double weight = search == ScaleSearch::hessian ? moment.data[i * moment.stride + i] : 1.0;
            for (int k = 0; k < count; ++k) sums[k] += weight * (errors[i][k] * errors[i][k]);
        }
    }
    return scales[std::min_element(sums.begin(), sums.end()) - sums.begin()];
}

// ---- How a magnitude `a` > 0 that should map to at most 6 becomes a stored scale.

// a = m * 2^k with 1 <= m < 2.
struct Binary {
    float mantissa;
    int exponent;
};

Binary split(float a) noexcept {
    const int k = std::ilogb(a);
    return {std::ldexp(a, -k), k};
}

// Beyond these exponents 6 * step would be infinite in float32.
constexpr int highest_exponent = 125, highest_of_thirds = 126;

std::uint8_t mx_scale(float a, MxRule rule) noexcept {
    if (a == 0) return 0;
    const auto [m, k] = split(a);
    switch (rule) {
        case MxRule::floor: return e8m0::from_exponent(std::min(k - 2, highest_exponent));                          // 2^(k-2): OCP; what lies above 6 * 2^(k-2) saturates
        case MxRule::ceil: return e8m0::from_exponent(std::min(k - 2 + (m > 1.5f), highest_exponent));              // the smallest with a <= 6 * scale
        case MxRule::even: return e8m0::from_exponent(std::min(k - 2 + (m >= 1.75f), highest_exponent));            // floor of a rounded half up to one mantissa bit
        case MxRule::four_thirds: return e8m0::from_exponent(std::min(k, highest_of_thirds));              // 4/3 * 2^(k-2) = 2^k / 3
    }
    return 0;
}

// 2^floor(log2(σ 2.92247856 / 6)), σ about the group's mean: the clipping that suits a normal distribution best (QuEST, arXiv 2502.05003; Quartet, arXiv 2505.14669; QuTLASS).
std::uint8_t quest_scale(const float* group) noexcept {
    constexpr Index size = Mxfp4::group_size;
    double mean = 0, square = 0;
    for (Index c = 0; c < size; ++c) mean += group[c];
    mean /= size;
    for (Index c = 0; c < size; ++c) square += (group[c] - mean) * (group[c] - mean);
    const double sixth = std::sqrt(square / size) * (2.92247856 / 6.0);
    return sixth > 0 ? e8m0::from_exponent(std::min(std::ilogb(sixth), highest_exponent)) : 0;
}

std::uint8_t nvfp4_scale(float sixth, float tensor_scale) noexcept {
    const std::uint8_t bits = e4m3::encode(std::min(sixth * tensor_scale, e4m3::largest));
    // A scale that vanishes becomes 0.125, as compressed-tensors writes it: no stored scale decodes to zero. Its codes are zeros (or nearly).
    return bits == 0 ? 0x20 : bits;
}

// The better by Σ err² of the scales that map the largest magnitude to 6 and to 4, where the grid is finer; 6 on a tie (arXiv 2512.02010).
std::uint8_t four_over_six_scale(const float* group, float amax, float tensor_scale) noexcept {
    const std::array<std::uint8_t, 2> scales = {nvfp4_scale(amax / 6.0f, tensor_scale), nvfp4_scale(amax / 4.0f, tensor_scale)};
    std::array<double, 2> sums{};
    for (std::size_t k = 0; k < 2; ++k) {
        const float step = group_step<Nvfp4>(scales[k], tensor_scale);
        for (Index c = 0; c < Nvfp4::group_size; ++c) {
            const float magnitude = std::fabs(group[c]);
            const double error = static_cast<double>(magnitude) - step * e2m1::round_magnitude(magnitude / step);
            sums[k] += error * error;
        }
    }
    return scales[sums[1] < sums[0]];
}

float round_to_bfloat16(float x) noexcept {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    return std::bit_cast<float>((bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u);
}

}  // namespace

ScaleSearch scale_search_named(std::string_view name) {
    constexpr std::pair<std::string_view, ScaleSearch> known[] = {{"absmax", ScaleSearch::absmax},         {"fpquant_mse", ScaleSearch::fpquant_mse},     {"mse", ScaleSearch::mse},
                                                                  {"hessian", ScaleSearch::hessian},       {"hessian_block", ScaleSearch::hessian_block}, {"four_over_six", ScaleSearch::four_over_six},
                                                                  {"quest", ScaleSearch::quest}};
    for (const auto& [known_name, search] : known)
        if (name == known_name) return search;
    check(false, "unknown scale search \"" + std::string(name) + "\"; known: absmax, fpquant_mse, mse, hessian, hessian_block, four_over_six, quest");
    return ScaleSearch::absmax;
}

MxRule mx_rule_named(std::string_view name) {
    if (name == "floor") return MxRule::floor;
    if (name == "ceil") return MxRule::ceil;
    if (name == "even") return MxRule::even;
    check(name == "four-thirds", "unknown MX rule \"" + std::string(name) + "\"; known: floor, ceil, even, four-thirds");
    return MxRule::four_thirds;
}

float mx_tensor_scale(MxRule rule) noexcept { return rule == MxRule::four_thirds ? 3.0f : 1.0f; }

float nvfp4_tensor_scale(float amax) noexcept {
    float g = Nvfp4::tensor_scale_numerator / amax;
    if (!std::isfinite(g)) return 1.0f;
    while (!std::isfinite(e2m1::largest * (e4m3::largest / g))) g = std::nextafter(g, std::numeric_limits<float>::infinity());
    return g;
}

float group_amax(const float* x, Index count) noexcept {
    // Magnitudes of floats order like their bits, and an integer maximum vectorises without any licence to reorder.
    std::uint32_t largest = 0;
    for (Index i = 0; i < count; ++i) largest = std::max(largest, std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFFu);
    return std::bit_cast<float>(largest);
}

template <class Format>
std::uint8_t moved_scale(std::uint8_t bits, int offset, float tensor_scale) noexcept {
    if constexpr (std::is_same_v<Format, Nvfp4>) return static_cast<std::uint8_t>(std::clamp(bits + offset, 1, 0x7E));
    const int highest = e8m0::bias + (tensor_scale == mx_tensor_scale(MxRule::four_thirds) ? highest_of_thirds : highest_exponent);
    return static_cast<std::uint8_t>(std::clamp(bits + offset, 0, highest));
}

template <class Format>
std::uint8_t search_start(float amax, MxRule mx, float tensor_scale) noexcept {
    if constexpr (std::is_same_v<Format, Mxfp4>) return mx_scale(amax, mx);
    if (amax == 0) return nvfp4_scale(0, tensor_scale);
    return std::max<std::uint8_t>(e4m3::encode(std::min(amax / e2m1::largest * tensor_scale, e4m3::largest)), 1);
}

template <class Format>
std::uint8_t group_scale(const float* group, const ScaleRule& rule, float tensor_scale, GroupMoment moment) noexcept {
    const float amax = group_amax(group, Format::group_size);
    float sixth = amax / e2m1::largest;
    if (rule.bfloat16_sixth) sixth = round_to_bfloat16(sixth);
    const auto absmax = [&] {
        if constexpr (std::is_same_v<Format, Mxfp4>) return mx_scale(amax, rule.mx);
        return nvfp4_scale(sixth, tensor_scale);
    };
    if (amax == 0) return absmax();
    switch (rule.search) {
        case ScaleSearch::absmax: break;
        case ScaleSearch::fpquant_mse:
            if (sixth == 0) break;
            sixth = searched_step<Format::group_size>(group, sixth);
            if constexpr (std::is_same_v<Format, Mxfp4>) return mx_scale(e2m1::largest * sixth, rule.mx);
            break;
        case ScaleSearch::mse:
        case ScaleSearch::hessian:
        case ScaleSearch::hessian_block: return least_error_scale<Format>(group, search_start<Format>(amax, rule.mx, tensor_scale), rule.search, tensor_scale, moment);
        case ScaleSearch::four_over_six:
            if constexpr (std::is_same_v<Format, Nvfp4>) return four_over_six_scale(group, amax, tensor_scale);
            break;
        case ScaleSearch::quest:
            if constexpr (std::is_same_v<Format, Mxfp4>) return quest_scale(group);
            break;
    }
    return absmax();
}

template std::uint8_t moved_scale<Mxfp4>(std::uint8_t, int, float) noexcept;
template std::uint8_t moved_scale<Nvfp4>(std::uint8_t, int, float) noexcept;
template std::uint8_t search_start<Mxfp4>(float, MxRule, float) noexcept;
template std::uint8_t search_start<Nvfp4>(float, MxRule, float) noexcept;
template std::uint8_t group_scale<Mxfp4>(const float*, const ScaleRule&, float, GroupMoment) noexcept;
template std::uint8_t group_scale<Nvfp4>(const float*, const ScaleRule&, float, GroupMoment) noexcept;

}  // namespace mrgptq
