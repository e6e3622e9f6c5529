#include "codecs/scale_rule.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

namespace mrgptq {
namespace {

// ---- fpquant_mse: FP-Quant's `--w_observer mse`.
// Steps s_i = (1 - 0.8 i / 100) * amax / 6 for i = 0 ... 99, unrounded; the first that gives the least sum over the group of |x - round(x / s_i) s_i|^2.4 wins.

constexpr int shrink_count = 100;

constexpr std::array<float, shrink_count> shrink_factors = [] {
    std::array<float, shrink_count> factors{};
    for (int i = 0; i < shrink_count; ++i) factors[i] = static_cast<float>(1.0 - i * 0.8 / 100.0);
    return factors;
}();

// |e|^2.4 as e^2 * (fifth root of |e|)^2, in operations that IEEE 754 fixes, so that reference.py computes the same bits; a libm's pow would not.
// The root starts from dividing the exponent by five (3 % off) and takes two Halley steps, which leaves 1e-12.
inline double power_2_4(double e) noexcept {
    const double x = std::fabs(e);
    // Below 2^-200 no difference of two float32 numbers exists but zero; the clamp keeps the root of zero out of the subnormals.
    constexpr std::uint64_t smallest_exponent = std::uint64_t{1023 - 200} << 20;
    const std::uint64_t high = std::max(std::bit_cast<std::uint64_t>(x) >> 32, smallest_exponent);
    const std::uint64_t fifth = high * 0x33333333u >> 32;
    double y = std::bit_cast<double>((fifth + 0x3325D000u) << 32);
    for (int step = 0; step < 2; ++step) {
        const double y5 = (y * y) * (y * y) * y;
        y = y * (2.0 * y5 + 3.0 * x) / (3.0 * y5 + 2.0 * x);
    }
    return (x * x) * (y * y);
}

// round(|t|) to the E2M1 grid, as a value: three spacings, each rounded to nearest even. At the seams the finer grid's upper end is the coarser grid's lower end.
inline double round_magnitude(double t) noexcept {
    const double fine = std::nearbyint(t * 2.0) * 0.5;
    const double middle = std::nearbyint(t);
    const double coarse = std::min(std::nearbyint(t * 0.5) * 2.0, 6.0);
    return t < 2.0 ? fine : (t < 4.0 ? middle : coarse);
}

template <Index group_size>
float searched_step(const float* group, float sixth) noexcept {
    std::array<double, shrink_count> steps, inverses, errors{};
    for (int i = 0; i < shrink_count; ++i) {
        steps[i] = shrink_factors[i] * sixth;
        inverses[i] = 1.0 / steps[i];
    }
    for (Index c = 0; c < group_size; ++c) {
        const double x = std::fabs(group[c]);
        for (int i = 0; i < shrink_count; ++i) {
            // The reciprocal can only move an exact tie, and either side of a tie leaves the same error.
            errors[i] += power_2_4(x - round_magnitude(x * inverses[i]) * steps[i]);
        }
    }
    return static_cast<float>(steps[std::min_element(errors.begin(), errors.end()) - errors.begin()]);
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

std::uint8_t mx_scale(float a, MxRule rule) noexcept {
    // Beyond these exponents 6 * step would be infinite in float32.
    constexpr int highest = 125, highest_of_thirds = 126;
    if (a == 0) return 0;
    const auto [m, k] = split(a);
    switch (rule) {
        case MxRule::floor: return e8m0::from_exponent(std::min(k - 2, highest));                          // 2^(k-2): OCP; what lies above 6 * 2^(k-2) saturates
        case MxRule::ceil: return e8m0::from_exponent(std::min(k - 2 + (m > 1.5f), highest));              // the smallest with a <= 6 * scale
        case MxRule::even: return e8m0::from_exponent(std::min(k - 2 + (m >= 1.75f), highest));            // floor of a rounded half up to one mantissa bit
        case MxRule::four_thirds: return e8m0::from_exponent(std::min(k, highest_of_thirds));              // 4/3 * 2^(k-2) = 2^k / 3
    }
    return 0;
}

std::uint8_t nvfp4_scale(float sixth, float tensor_scale) noexcept {
    const std::uint8_t bits = e4m3::encode(std::min(sixth * tensor_scale, e4m3::largest));
    // A scale that vanishes becomes 0.125, as compressed-tensors writes it: no stored scale decodes to zero. Its codes are zeros (or nearly).
    return bits == 0 ? 0x20 : bits;
}

float round_to_bfloat16(float x) noexcept {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    return std::bit_cast<float>((bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u);
}

}  // namespace

ScaleSearch scale_search_named(std::string_view name) {
    if (name == "absmax") return ScaleSearch::absmax;
    check(name == "fpquant_mse", "unknown scale search \"" + std::string(name) + "\"; known: absmax, fpquant_mse");
    return ScaleSearch::fpquant_mse;
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
std::uint8_t group_scale(const float* group, const ScaleRule& rule, float tensor_scale) noexcept {
    const float amax = group_amax(group, Format::group_size);
    float sixth = amax / e2m1::largest;
    if (rule.bfloat16_sixth) sixth = round_to_bfloat16(sixth);
    const bool search = rule.search == ScaleSearch::fpquant_mse && sixth > 0;
    if (search) sixth = searched_step<Format::group_size>(group, sixth);
    if constexpr (std::is_same_v<Format, Mxfp4>) return mx_scale(search ? e2m1::largest * sixth : amax, rule.mx);
    return nvfp4_scale(sixth, tensor_scale);
}

template std::uint8_t group_scale<Mxfp4>(const float*, const ScaleRule&, float) noexcept;
template std::uint8_t group_scale<Nvfp4>(const float*, const ScaleRule&, float) noexcept;

}  // namespace mrgptq
