// E2M1, the 4-bit float whose codes MXFP4 and NVFP4 store (OCP Microscaling Formats v1.0, section 5.3.3).
//
//   code    0     1     2     3     4     5     6     7
//   value   0    0.5    1    1.5    2     3     4     6      code 8 + k is -value(k)
//
// There is no infinity and no NaN. The step doubles at 2 and again at 4, so near 6 the grid is four times coarser than near 0 and no uniform-noise model of its error is right.
// Nothing in this file knows about groups or scales; see formats/block_format.h.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

namespace mrgptq::e2m1 {

inline constexpr float largest = 6.0f;
inline constexpr std::array<float, 16> values = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

constexpr float decode(std::uint8_t code) noexcept { return values[code & 15]; }

// The code nearest to `x`; a tie goes to the even code, as the hardware conversions do, which is why the seven comparisons alternate between > and >=. Beyond +-6 it saturates.
// A value that rounds to zero gets code 0 whatever its sign: -0 buys nothing, and half of the ecosystem's packers disagree about it.
// Precondition: `x` is not NaN. A NaN would compare false seven times and come back as zero, a silent hole in a weight, so whoever calls has refused it.
template <class Real>
constexpr std::uint8_t encode(Real x) noexcept {
    const Real a = x < 0 ? -x : x;
    const std::uint8_t code = static_cast<std::uint8_t>((a > Real(0.25)) + (a >= Real(0.75)) + (a > Real(1.25)) + (a >= Real(1.75)) + (a > Real(2.5)) + (a >= Real(3.5)) + (a > Real(5)));
    return static_cast<std::uint8_t>(code | ((x < 0 && code != 0) ? 8 : 0));
}

// Added to a value and taken off again it leaves that value rounded to a whole number, ties to even: its unit in the last place is 1, and 1.5 at the power of two keeps the sum in its
// binade.
template <class Real>
inline constexpr Real anchor = static_cast<Real>(std::uint64_t{3} << (std::numeric_limits<Real>::digits - 2));

// The grid's value nearest to t >= 0, as encode() would choose it. At the seams the finer grid's upper end is the coarser one's lower end.
// For loops that want the value and no code: unlike a table look-up this vectorises.
template <class Real>
inline Real round_magnitude(Real t) noexcept {
    const Real of_spacing = t < Real(2) ? anchor<Real> / 2 : (t < Real(4) ? anchor<Real> : anchor<Real> * 2);
    return std::min((t + of_spacing) - of_spacing, Real(6));
}

// The code of half of `halves`, twice a value of the grid. Sums of comparisons, as above, so that it vectorises.
constexpr std::uint8_t encode_halves(std::int8_t halves) noexcept {
    const std::uint8_t a = static_cast<std::uint8_t>(halves < 0 ? -halves : halves);
    const std::uint8_t code = static_cast<std::uint8_t>(a - (a > 4) - (a > 6) - 3 * (a > 8));
    return static_cast<std::uint8_t>(code | (halves < 0 ? 8 : 0));
}

static_assert(encode(0.25f) == 0 && encode(0.75f) == 2 && encode(1.25f) == 2 && encode(1.75f) == 4 && encode(2.5f) == 4 && encode(3.5f) == 6 && encode(5.0f) == 6);
static_assert(encode_halves(0) == 0 && encode_halves(4) == 4 && encode_halves(-6) == 13 && encode_halves(8) == 6 && encode_halves(-12) == 15);
static_assert(encode(-0.2f) == 0 && encode(-0.3f) == 9 && encode(1e30f) == 7 && encode(-1e30) == 15);

}  // namespace mrgptq::e2m1
