// Element and scale types: every code, in constant expressions too, and the switch over formats.
#include <gtest/gtest.h>

#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "formats/block_format.h"
#include "refusal.h"

namespace mrgptq {
namespace {

constexpr bool every_e2m1_code_round_trips() {
    for (unsigned code = 0; code < 16; ++code) {
        const unsigned expected = code == 8 ? 0 : code;  // one zero
        if (e2m1::encode(e2m1::decode(static_cast<std::uint8_t>(code))) != expected) return false;
        if (e2m1::encode(static_cast<double>(e2m1::decode(static_cast<std::uint8_t>(code)))) != expected) return false;
        if (std::bit_cast<std::uint32_t>(e2m1::decode(static_cast<std::uint8_t>(code + 16))) != std::bit_cast<std::uint32_t>(e2m1::values[code])) return false;
    }
    return true;
}
static_assert(every_e2m1_code_round_trips());

constexpr bool every_e4m3_code_round_trips() {
    for (unsigned bits = 0; bits < 256; ++bits) {
        const float value = e4m3::decode(static_cast<std::uint8_t>(bits));
        const bool nan = value != value;
        if (nan != ((bits & 0x7F) == 0x7F)) return false;
        if (!nan && e4m3::encode(value) != bits) return false;
    }
    return true;
}
static_assert(every_e4m3_code_round_trips());

static_assert(e8m0::from_exponent(-127) == 0 && e8m0::from_exponent(-128) == 0 && e8m0::from_exponent(127) == 254 && e8m0::from_exponent(128) == 254);
static_assert(e8m0::from_exponent(INT_MAX) == 254 && e8m0::from_exponent(INT_MIN) == 0);
static_assert(group_step<Mxfp4>(128, 1.0f) == 2.0f && group_step<Mxfp4>(129, 3.0f) == 4.0f / 3.0f && group_step<Nvfp4>(0x7E, 2688.0f) == 448.0f / 2688.0f);
static_assert(Nvfp4::tensor_scale_numerator == 2688.0f && Mxfp4::group_size == 32 && Nvfp4::group_size == 16);

TEST(E2m1, TakesTheNearestOfTheTableInBothPrecisions) {
    // The table by brute force, ties to the even code. In float64 a number next to a tie is closer to it than any float32 can be.
    for (unsigned lower = 0; lower < 7; ++lower) {
        const double tie = (static_cast<double>(e2m1::values[lower]) + e2m1::values[lower + 1]) / 2;
        const unsigned even = lower % 2 == 0 ? lower : lower + 1;
        for (const double sign : {1.0, -1.0}) {
            const auto coded = [&](unsigned code) { return sign < 0 && code != 0 ? code + 8 : code; };
            EXPECT_EQ(e2m1::encode(sign * tie), coded(even));
            EXPECT_EQ(e2m1::encode(sign * std::nextafter(tie, 9.0)), coded(lower + 1));
            EXPECT_EQ(e2m1::encode(sign * std::nextafter(tie, 0.0)), coded(lower));
            EXPECT_EQ(e2m1::encode(static_cast<float>(sign * tie)), coded(even));
            EXPECT_EQ(e2m1::encode(static_cast<float>(sign) * std::nextafter(static_cast<float>(tie), 9.0f)), coded(lower + 1));
            EXPECT_EQ(e2m1::encode(static_cast<float>(sign) * std::nextafter(static_cast<float>(tie), 0.0f)), coded(lower));
        }
    }
    EXPECT_EQ(e2m1::encode(std::numeric_limits<double>::infinity()), 7);
    EXPECT_EQ(e2m1::encode(-std::numeric_limits<float>::infinity()), 15);
    EXPECT_EQ(e2m1::encode(-0.0f), 0);
}

template <class Real>
void expect_magnitudes_as_encoded() {
    const auto expect = [](Real t) { EXPECT_EQ(e2m1::round_magnitude(t), static_cast<Real>(e2m1::decode(e2m1::encode(t)))) << t; };
    for (int quarter = 0; quarter <= 32; ++quarter)  // ties, seams and values among them
        for (const Real t : {static_cast<Real>(quarter) / 4, std::nextafter(static_cast<Real>(quarter) / 4, Real(9)), std::nextafter(static_cast<Real>(quarter) / 4, Real(0))}) expect(t);
    for (const Real t : {std::numeric_limits<Real>::denorm_min(), std::numeric_limits<Real>::max(), std::numeric_limits<Real>::infinity()}) expect(t);
}

TEST(E2m1, RoundsMagnitudesAsItEncodesThem) {
    expect_magnitudes_as_encoded<float>();
    expect_magnitudes_as_encoded<double>();
}

TEST(E4m3, SaturatesAndKeepsTheSign) {
    for (const float beyond : {448.0f, 449.0f, 464.0f, 480.0f, 1e30f, std::numeric_limits<float>::infinity()}) {
        EXPECT_EQ(e4m3::encode(beyond), 0x7E);
        EXPECT_EQ(e4m3::encode(-beyond), 0xFE);
    }
    EXPECT_EQ(e4m3::encode(0x1p-10f), 0);  // a tie between 0 and the smallest
    EXPECT_EQ(e4m3::encode(std::nextafter(0x1p-10f, 1.0f)), 1);
    EXPECT_EQ(e4m3::encode(-0x1p-10f), 0x80);
}

TEST(E8m0, EveryByteRoundTripsAndTheRestRoundsDown) {
    for (int byte = 0; byte < 255; ++byte) {
        const float power = e8m0::decode(static_cast<std::uint8_t>(byte));
        EXPECT_EQ(power, std::ldexp(1.0f, byte - 127));
        EXPECT_EQ(e8m0::encode(power), byte);
        EXPECT_EQ(e8m0::encode(std::nextafter(2 * power, 0.0f)), byte);
    }
    EXPECT_TRUE(std::isnan(e8m0::decode(255)));
    EXPECT_EQ(e8m0::encode(std::numeric_limits<float>::infinity()), 254);
    EXPECT_EQ(e8m0::encode(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(WithFormat, PicksTheTypeByName) {
    const auto name_of = [](auto format) { return decltype(format)::name; };
    EXPECT_EQ(with_format("mxfp4", name_of), "mxfp4");
    EXPECT_EQ(with_format("nvfp4", name_of), "nvfp4");
    for (const char* unknown : {"", "mxfp", "mxfp44", "MXFP4", "int4"})
        testing::expect_refused("unknown format \"" + std::string(unknown) + "\"; known: mxfp4, nvfp4", [&] { with_format(unknown, name_of); });
}

}  // namespace
}  // namespace mrgptq
