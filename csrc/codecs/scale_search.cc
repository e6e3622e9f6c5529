#include "codecs/scale_search.h"

#include <bit>
#include <cmath>

#include "codecs/chunk.h"
#include "codecs/shrink.h"

namespace mrgptq {
namespace {

using namespace simd;

MRGPTQ_INLINE Words exponent_of(Words magnitude) noexcept { return magnitude >> 23; }

// Σ over a group's columns of term(vector of columns), for a chunk of groups: lane g is group g.
template <class Format, class Term>
MRGPTQ_INLINE Floats group_sums(Term&& term) noexcept {
    return fold(
        [&](int group) {
            Floats sum = term(group, 0);
            for (int i = 1; i < Format::group_size / lanes; ++i) sum += term(group, i * lanes);
            return sum;
        },
        [](Floats a, Floats b) { return a + b; });
}

}  // namespace

// mse. With u = 2^-24: the estimate takes t' = |x| fl(1/s), within 3u t of the definition's t = fl(|x| / s), and e' = t' - round(t'), where the definition has e = |x| - fl(s round(t)).
// Where both round alike, |e - s e'| <= 7u |x|; where they do not, a tie lies between t and t', either side of which is as far, and |(|e| - s |e'|)| <= 10u |x|. So with L = Σ e² and
// X = Σ x², |L - s² Σ e'²| <= 20u sqrt(L X) + 100u² X + 12u L (the last for float32's sums) <= 2^-14 L + 2^-26 X. A candidate can be the best only where its estimate is below
// (1 + 2^-12) times the least plus 2^-24 X; one alone is the answer. The bound needs no overflow and no underflow: the exponents are held near to each other and to 1.
template <class Format>
void least_error_scales(const float* x, Words amax, const ScaleRule& rule, float tensor_scale, std::uint8_t* scales) noexcept {
    constexpr int below = SearchRange<Format>::below, count = below + SearchRange<Format>::above + 1;
    const auto column = [&](int group, int c) { return abs(load(x + group * Format::group_size + c)); };

    Words start = absmax_scales<Format>(amax, {ScaleSearch::absmax, rule.mx, false}, tensor_scale);
    if constexpr (std::is_same_v<Format, Nvfp4>) start = max(encode_e4m3(floats(amax) / e2m1::largest * tensor_scale), splat(1u));
    const Words lowest = splat(std::uint32_t{moved_scale<Format>(0, 0, tensor_scale)}), highest = splat(std::uint32_t{moved_scale<Format>(255, 0, tensor_scale)});

    const Floats energy = group_sums<Format>([&](int group, int c) {
        const Floats value = column(group, c);
        return value * value;
    });
    const E2m1Rounder to_e2m1;
    Words candidates[count];
    Floats losses[count], least = splat(INFINITY);
    for (int k = 0; k < count; ++k) losses[k] = least;
    Words best = start, sure = (Words)(exponent_of(amax) - (127u - 50) <= 100u);
    // From absmax up, and then down.
    for (int i = 0; i < count; ++i) {
        const int k = i <= SearchRange<Format>::above ? below + i : count - 1 - i;
        // Clamped from both sides; the bias keeps the subtraction from wrapping.
        candidates[k] = min(max(start + static_cast<std::uint32_t>(k), lowest + static_cast<std::uint32_t>(below)) - static_cast<std::uint32_t>(below), highest);
        const Floats steps = group_steps<Format>(candidates[k], tensor_scale);
        if (std::is_same_v<Format, Mxfp4> && tensor_scale == 1.0f && k > below) {
            // Steps are powers of two, quotients and values exact. Half the step has every value that this one has up to 6 of its own, and 7 of it round no higher: no error is larger there, nor is
            // any sum of their squares, and of equal ones the smaller step is taken.
            const Mask never = floats(amax) <= steps * 3.5f;
            if (!any_at_least(~(Words)never & sure, 1)) continue;
        }
        sure &= (Words)(exponent_of(bits(steps)) + 40u - exponent_of(amax) <= 80u);
        if (k < below) {
            // What clipping costs the largest magnitude alone, which only grows from here on down. The second term keeps the difference's own rounding small.
            const Floats clipped = floats(amax) - steps * e2m1::largest;
            const Mask hopeless = (clipped > 0.0f) & (clipped * clipped > least * (1 + 0x1p-8f) + energy * 0x1p-20f);
            if (!any_at_least(~(Words)hopeless & sure, 1)) {
                for (int rest = k; rest >= 0; --rest) candidates[rest] = candidates[k];
                break;
            }
        }
        const LanesInMemory inverses(1.0f / steps);
        const Floats sums = group_sums<Format>([&](int group, int c) {
            const Floats t = column(group, c) * inverses.splatted(group);
            const Floats e = t - to_e2m1.round_magnitude(t);
            return e * e;
        });
        losses[k] = sums * steps * steps;
        const Mask less = losses[k] < least;
        least = select(less, losses[k], least);
        best = select(less, candidates[k], best);
    }
    const Floats limit = least * (1 + 0x1p-12f) + energy * 0x1p-24f;
    Words possible{};
    for (int k = 0; k < count; ++k) {
        const Mask repeated = k == 0 ? Mask{} : Mask(candidates[k] == candidates[k - 1]);  // clamped to one already counted
        possible += select((losses[k] > limit) | repeated, Words{}, splat(1u));             // a NaN stays possible
    }
    sure &= (Words)(possible == 1u);

    store_bytes(scales, best);
    std::uint32_t decided[lanes];
    store(decided, sure);
    for (int group = 0; group < lanes; ++group)
        if (!decided[group]) scales[group] = group_scale<Format>(x + group * Format::group_size, rule, tensor_scale);
}

// ---- fpquant_mse

namespace {

// Candidates side by side, filled up with the last.
struct Candidates {
    static constexpr int vectors = (shrink_count + lanes - 1) / lanes;
    float factors[vectors * lanes], inverses[vectors * lanes];
    float clipping[vectors];  // in units of sixth^2.4, the least that the largest magnitude loses by being clipped under the vector's first candidate, and so under all later ones

    Candidates() noexcept {
        for (int i = 0; i < vectors * lanes; ++i) {
            factors[i] = shrink_factors[static_cast<std::size_t>(std::min(i, shrink_count - 1))];
            inverses[i] = 1.0f / factors[i];
        }
        for (int v = 0; v < vectors; ++v) clipping[v] = static_cast<float>(power_2_4(6.0 - 6.0 * factors[v * lanes]));
    }
};

const Candidates shrunk;

// |e|^2.4 = (|e| y)^3 with y = |e|^(-1/5) by two Newton steps from a fifth of the exponent: between 8e-5 too small and 1e-6 too large, for every mantissa and exponent (measured).
MRGPTQ_INLINE Floats rough_power_2_4(Floats e) noexcept {
    const Words magnitude = max(magnitude_bits(e), splat((127u - 40) << 23));  // keeps y^5 finite; what is smaller adds nothing
    const Floats x = floats(magnitude);
    typedef std::int32_t Integers __attribute__((vector_size(sizeof(Words))));
    const Floats fifth = __builtin_convertvector((Integers)magnitude, Floats) * 0.2f;
    Floats y = floats(0x4C2B9333u - (Words)__builtin_convertvector(fifth, Integers));
    for (int step = 0; step < 2; ++step) {
        const Floats y2 = y * y;
        y = y * (1.2f - 0.2f * (y2 * y2 * (x * y)));
    }
    const Floats xy = x * y;
    return xy * xy * xy;
}

// searched_step() for 2^-60 <= sixth = fl(amax / 6) < 2^60. In units of sixth, the estimate's errors e' = z - round(z / f) f differ in magnitude from the definition's e by at most
// d = 2^-18, z being at most 6 and off by 2^-23 of itself, the quotient by 2^-22. So the losses differ by 2.4 Σ (e + d)^1.4 d <= 2.4 d (G + Σ e^2.4) with some room, which is 1e-5 (G + L),
// and by the power's 8e-5 L. A candidate can be the best only within twice these of the least.
template <Index group_size>
float pruned_step(const float* group, float sixth) noexcept {
    constexpr float relative = 2.5e-4f, absolute = 2.5e-5f * static_cast<float>(group_size);
    const float inverse = 1.0f / sixth;
    float scaled[group_size];
    for (Index c = 0; c < group_size; ++c) scaled[c] = std::fabs(group[c]) * inverse;
    asm("" : "+m"(scaled));  // as LanesInMemory

    const E2m1Rounder to_e2m1;
    float losses[Candidates::vectors * lanes], least = INFINITY;
    int count = 0;
    for (int v = 0; v < Candidates::vectors; ++v, count += lanes) {
        if (shrunk.clipping[v] > (1 + 1e-3f) * least + absolute) break;
        const Floats factors = load(shrunk.factors + v * lanes), inverses = load(shrunk.inverses + v * lanes);
        Floats sum{};
        for (Index c = 0; c < group_size; ++c) {
            const Floats z = splat(scaled[c]);
            sum += rough_power_2_4(z - to_e2m1.round_magnitude(z * inverses) * factors);
        }
        store(losses + v * lanes, sum);
        least = std::min(least, std::bit_cast<float>(smallest_lane(bits(sum))));  // no lane has a sign
    }
    const float limit = least * (1 + relative) + absolute;
    int best = -1, possible = 0;
    for (int i = 0; i < std::min(count, shrink_count); ++i)
        if (losses[i] <= limit && possible++ == 0) best = i;
    if (possible > 1) {
        double exact = shrink_loss<group_size>(group, sixth, best);
        for (int i = best + 1; i < std::min(count, shrink_count); ++i)
            if (losses[i] <= limit)
                if (const double loss = shrink_loss<group_size>(group, sixth, i); loss < exact) {
                    exact = loss;
                    best = i;
                }
    }
    return shrink_factors[static_cast<std::size_t>(best)] * sixth;
}

}  // namespace

template <class Format>
void shrunk_scales(const float* x, Words amax, const ScaleRule& rule, float tensor_scale, std::uint8_t* scales) noexcept {
    constexpr Index size = Format::group_size;
    float sixths[lanes], steps[lanes];
    store(sixths, floats(amax) / e2m1::largest);
    for (int group = 0; group < lanes; ++group) {
        const bool moderate = sixths[group] >= 0x1p-60f && sixths[group] < 0x1p60f && !rule.bfloat16_sixth;
        steps[group] = moderate ? pruned_step<size>(x + group * size, sixths[group]) : 0.0f;
    }
    const Floats found = load(steps);
    Words stored;
    if constexpr (std::is_same_v<Format, Nvfp4>)
        stored = nvfp4_scales(found, tensor_scale);
    else
        stored = absmax_scales<Format>(bits(found * e2m1::largest), rule, tensor_scale);
    store_bytes(scales, stored);
    for (int group = 0; group < lanes; ++group)
        if (steps[group] == 0) scales[group] = group_scale<Format>(x + group * size, rule, tensor_scale);
}

template void shrunk_scales<Mxfp4>(const float*, Words, const ScaleRule&, float, std::uint8_t*) noexcept;
template void shrunk_scales<Nvfp4>(const float*, Words, const ScaleRule&, float, std::uint8_t*) noexcept;
template void least_error_scales<Mxfp4>(const float*, Words, const ScaleRule&, float, std::uint8_t*) noexcept;
template void least_error_scales<Nvfp4>(const float*, Words, const ScaleRule&, float, std::uint8_t*) noexcept;

}  // namespace mrgptq
