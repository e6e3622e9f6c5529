// The vector kernels against the scalar definitions, bit for bit, at the level this test is compiled for: every code, every scale, every tie and its neighbours, and a stride through all of
// float32.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "codecs/chunk.h"
#include "codecs/codec.h"
#include "codecs/shrink.h"
#include "rotations/rotation.h"
#include "matrices.h"
#include "refusal.h"
#include "simd/butterflies.h"
#include "simd/dot.h"
#include "simd/e2m1.h"
#include "simd/e4m3.h"
#include "simd/nibbles.h"

namespace mrgptq {
namespace {

using namespace simd;
using testing::Matrix, testing::random_matrix, testing::thread_counts;

// Calls check(vector, its lanes) for `values`, filled up with the last.
template <class Check>
void for_vectors(std::vector<float> values, Check&& check) {
    while (values.size() % lanes) values.push_back(values.back());
    for (std::size_t i = 0; i < values.size(); i += lanes) check(load(&values[i]), &values[i]);
}

// Ties of the grid, its values, their neighbours both ways, the ends of float32, and 5 million more over all signs and exponents.
const std::vector<float>& every_kind_of_float() {
    static const std::vector<float> floats = [] {
        std::vector<float> all = {0.0f, 0x1p-149f, 0x1p-126f, 0x1.fffffep127f, INFINITY, 1e30f};
        for (const float x : {0.25f, 0.5f, 0.75f, 1.0f, 1.25f, 1.5f, 1.75f, 2.0f, 2.5f, 3.0f, 3.5f, 4.0f, 5.0f, 6.0f, 8.0f, 16.0f})
            for (const float near : {x, std::nextafter(x, 0.0f), std::nextafter(x, 99.0f)}) all.push_back(near);
        for (std::uint32_t bits = 0; bits < infinity_bits; bits += 431) all.push_back(std::bit_cast<float>(bits));
        const std::size_t positive = all.size();
        for (std::size_t i = 0; i < positive; ++i) all.push_back(-all[i]);
        return all;
    }();
    return floats;
}

TEST(SimdE2m1, EncodesAndRoundsAsTheDefinition) {
    const E2m1Rounder to_e2m1;
    for_vectors(every_kind_of_float(), [&](Floats x, const float* lane) {
        const Words codes = to_e2m1.encode(x), magnitudes = bits(to_e2m1.round_magnitude(abs(x)));
        for (int i = 0; i < lanes; ++i) {
            ASSERT_EQ(codes[i], e2m1::encode(lane[i])) << lane[i];
            ASSERT_EQ(magnitudes[i], std::bit_cast<std::uint32_t>(e2m1::round_magnitude(std::fabs(lane[i])))) << lane[i];
        }
    });
}

TEST(SimdE2m1, DecodesByTheLowFourBits) {
    for (std::uint32_t code = 0; code < 256; ++code) {
        const Words values = bits(decode_e2m1(splat(code * 0x01010101u)));
        for (int i = 0; i < lanes; ++i) EXPECT_EQ(values[i], std::bit_cast<std::uint32_t>(e2m1::decode(static_cast<std::uint8_t>(code))));
    }
}

TEST(SimdDot, LiftsAndDoublesEveryCodeInEveryByte) {
    for (std::uint32_t code = 0; code < 16; ++code)
        for (std::uint32_t other = 0; other < 16; ++other) {
            const Words codes = splat(code | other << 8 | other << 16 | code << 24), up = lifted(codes), twice = doubled(codes);
            const auto value = [](std::uint32_t c) { return static_cast<int>(2 * e2m1::decode(static_cast<std::uint8_t>(c))); };
            for (int i = 0; i < lanes; ++i)
                for (int byte = 0; byte < 4; ++byte) {
                    const int expected = value(byte == 0 || byte == 3 ? code : other);
                    EXPECT_EQ(static_cast<int>(up[i] >> (8 * byte) & 0xFF), expected + lift);
                    EXPECT_EQ(static_cast<std::int8_t>(twice[i] >> (8 * byte)), expected);
                }
        }
}

// Eight words, 32 columns, of random numbers and of the largest of both signs: the sums are whole and exact.
TEST(SimdDot, SumsOf32ProductsAreExact) {
    std::mt19937 generator(3);
    for (int round = 0; round < 200; ++round) {
        const auto number = [&](int largest) { return round < 100 ? static_cast<int>(generator() % static_cast<unsigned>(2 * largest + 1)) - largest : largest * (round % 3 == 0 ? 1 : round % 3 == 1 ? -1 : generator() % 2 ? 1 : -1); };
        int expected[lanes] = {}, first = 0, last = 0;
        Words codes[8] = {}, others[8] = {};
        for (int word = 0; word < 8; ++word)
            for (int byte = 0; byte < 4; ++byte) {
                const int other = number(127);
                (byte < 2 ? first : last) += other;
                others[word] |= splat(static_cast<std::uint32_t>(other & 0xFF) << (8 * byte));
                for (int i = 0; i < lanes; ++i) {
                    const int doubled = number(12);
                    expected[i] += doubled * other;
                    codes[word][i] |= static_cast<std::uint32_t>(doubled + lift) << (8 * byte);
                }
            }
        Words sums = splat(beginning_of_sums(first, last));
        for (int word = 0; word < 8; ++word) sums = add_products(sums, codes[word], others[word]);
        const Floats whole = finished_sums(sums);
        for (int i = 0; i < lanes; ++i) ASSERT_EQ(whole[i], static_cast<float>(expected[i])) << "round " << round;
    }
}

TEST(SimdE4m3, EncodesWhatHasNoSignAndDecodesEveryByte) {
    for_vectors(every_kind_of_float(), [&](Floats x, const float* lane) {
        const Words bytes = encode_e4m3(abs(x));
        for (int i = 0; i < lanes; ++i) ASSERT_EQ(bytes[i], e4m3::encode(std::fabs(lane[i]))) << lane[i];
    });
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        EXPECT_EQ(bits(decode_e4m3(splat(byte)))[0], std::bit_cast<std::uint32_t>(e4m3::decode(static_cast<std::uint8_t>(byte))));
        for (const float divisor : {1.0f, 3.0f, 1234.5f}) {
            const auto same = [](float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (std::isnan(a) && std::isnan(b)); };
            EXPECT_TRUE(same(group_steps<Nvfp4>(splat(byte), divisor)[0], group_step<Nvfp4>(static_cast<std::uint8_t>(byte), divisor)));
            EXPECT_TRUE(same(group_steps<Mxfp4>(splat(byte), divisor)[0], group_step<Mxfp4>(static_cast<std::uint8_t>(byte), divisor)));
        }
        if (byte <= 253) {
            EXPECT_EQ(e8m0_reciprocals(splat(byte))[0], 1.0f / e8m0::decode(static_cast<std::uint8_t>(byte)));
        }
    }
}

TEST(SimdNibbles, EveryPairInEveryPlace) {
    std::mt19937 random(3);
    for (int round = 0; round < 4096; ++round) {
        std::uint32_t lane[16];
        std::uint8_t packed[8];
        Codes codes;
        for (auto& code : lane) code = random() & 15;
        for (int i = 0; i < vectors_of_16; ++i) codes.v[i] = load(lane + i * lanes);
        pack_nibbles(codes, packed);
        const Codes again = unpack_nibbles(packed);
        for (int j = 0; j < 8; ++j) ASSERT_EQ(packed[j], lane[2 * j] | lane[2 * j + 1] << 4);
        for (int j = 0; j < 16; ++j) ASSERT_EQ(again.v[j / lanes][j % lanes] & 15, lane[j]);
    }
}

TEST(SimdVector, FoldsVectorIToLaneI) {
    std::vector<std::uint32_t> words(lanes * lanes);
    std::mt19937 random(4);
    for (auto& word : words) word = static_cast<std::uint32_t>(random());
    const Words largest = fold([&](int i) { return load(&words[static_cast<std::size_t>(i * lanes)]); }, [](Words a, Words b) { return max(a, b); });
    for (int i = 0; i < lanes; ++i) {
        const auto begin = words.begin() + i * lanes;
        EXPECT_EQ(largest[i], *std::max_element(begin, begin + lanes));
        EXPECT_EQ(largest_lane(load(&*begin)), *std::max_element(begin, begin + lanes));
        EXPECT_EQ(smallest_lane(load(&*begin)), *std::min_element(begin, begin + lanes));
        EXPECT_TRUE(any_at_least(load(&*begin), largest[i]));
        EXPECT_TRUE(largest[i] == ~0u || !any_at_least(load(&*begin), largest[i] + 1));
    }
}

// The corrected quotient is the quotient: at random, and where a quotient is next to a tie of the grid, which is where a code could turn.
TEST(Divide, CorrectedQuotientsAreQuotients) {
    if constexpr (has_fused) {
        std::mt19937_64 random(5);
        std::uniform_real_distribution<float> mantissa(1.0f, 2.0f), quotient(0.2f, 8.0f);
        for (int round = 0; round < 400'000; ++round) {
            const float step = std::ldexp(mantissa(random), static_cast<int>(random() % 118) - 59);
            float near = quotient(random) * step;
            if (round % 2) near = static_cast<float>(0.25 * static_cast<double>(random() % 24 + 1) * static_cast<double>(step));
            std::vector<float> x(lanes, near);
            for (int i = 1; i < lanes; ++i) x[static_cast<std::size_t>(i)] = std::nextafter(x[static_cast<std::size_t>(i - 1)], i % 2 ? 0.0f : INFINITY);
            const Floats corrected = divide<Quotient::corrected>(load(x.data()), step, 1.0f / step);
            for (int i = 0; i < lanes; ++i) ASSERT_EQ(corrected[i], x[static_cast<std::size_t>(i)] / step) << x[static_cast<std::size_t>(i)] << " / " << step;
        }
    }
}

// Ordinary weights are: without that every group would be divided, to the same codes, only slower.
TEST(Divide, WhatIsBetweenTheSixtiethPowersOfTwoIsModerate) {
    const float low = std::ldexp(1.0f, -60), high = std::ldexp(1.0f, 60), above = std::nextafter(low, 1.0f), below = std::nextafter(high, 0.0f);
    const auto is_moderate = [](float amax, float step) {
        std::vector<float> largest(lanes, 1.0f), steps(lanes, 1.0f);
        largest[lanes / 2] = amax;
        steps[lanes / 2] = step;
        return moderate(bits(load(largest.data())), load(steps.data()));
    };
    for (const float amax : {0.0f, std::numeric_limits<float>::denorm_min(), low, 0.02f, 3.0f, below})
        for (const float step : {low, above, 0.003f, 1.0f, below}) EXPECT_TRUE(is_moderate(amax, step)) << amax << " / " << step;
    for (const float amax : {high, std::numeric_limits<float>::max(), std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) EXPECT_FALSE(is_moderate(amax, 1.0f)) << amax;
    for (const float step : {0.0f, std::nextafter(low, 0.0f), high, std::numeric_limits<float>::infinity()}) EXPECT_FALSE(is_moderate(1.0f, step)) << step;
}

TEST(MxBits, AreTheMxRulesForEveryExponentAndMantissa) {
    for (const MxRule rule : {MxRule::floor, MxRule::ceil, MxRule::even, MxRule::four_thirds}) {
        std::vector<float> magnitudes;
        for (std::uint32_t exponent = 0; exponent < 255; ++exponent)
            for (const std::uint32_t mantissa : {0u, 1u, 0x3FFFFFu, 0x400000u, 0x400001u, 0x5FFFFFu, 0x600000u, 0x600001u, 0x7FFFFFu}) magnitudes.push_back(std::bit_cast<float>(exponent << 23 | mantissa));
        for_vectors(magnitudes, [&](Floats x, const float* lane) {
            const Words bytes = absmax_scales<Mxfp4>(bits(x), {ScaleSearch::absmax, rule, false}, 1.0f);
            for (int i = 0; i < lanes; ++i) {
                float group[Mxfp4::group_size] = {0.0f, -lane[i]};
                ASSERT_EQ(bytes[i], group_scale<Mxfp4>(group, {ScaleSearch::absmax, rule, false}, 1.0f)) << lane[i];
            }
        });
    }
}

// ---- Whole rows, of widths that leave groups over for every number of lanes

template <class Format>
void expect_the_definition(const Matrix<float>& weight, const ScaleRule& rule, float tensor_scale) {
    const Index rows = weight.view().rows, groups = weight.view().cols / Format::group_size;
    Matrix<std::uint8_t> scales(rows, groups), codes(rows, groups * Format::group_size / 2);
    for (const int threads : thread_counts) {
        ASSERT_EQ(quantize(Format::name, rule, weight.view(), tensor_scale, codes.view(), scales.view(), threads), -1);
        for (Index r = 0; r < rows; ++r)
            for (Index g = 0; g < groups; ++g) {
                const float* group = weight.view().row(r) + g * Format::group_size;
                ASSERT_EQ(scales(r, g), group_scale<Format>(group, rule, tensor_scale)) << "row " << r << ", group " << g;
                const float step = group_step<Format>(scales(r, g), tensor_scale);
                for (Index c = 0; c < Format::group_size; ++c) {
                    const int code = codes(r, (g * Format::group_size + c) / 2) >> (c % 2 ? 4 : 0) & 15;
                    ASSERT_EQ(code, e2m1::encode(group[c] / step)) << "row " << r << ", group " << g << ", column " << c;
                }
            }
    }
}

// Groups of many kinds: normal, heavy-tailed, on the grid, few levels, sparse, zero; of sizes over all exponents where `wild`.
Matrix<float> mixed(Index rows, Index cols, bool wild, unsigned seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    Matrix<float> x(rows, cols);
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < cols; c += 16) {
            const int kind = static_cast<int>(random() % 6), exponent = wild ? static_cast<int>(random() % 270) - 148 : static_cast<int>(random() % 5) - 8;
            for (Index i = c; i < c + 16; ++i) {
                float value = normal(random);
                if (kind == 1) value = value * value * value;
                if (kind == 2) value = e2m1::values[random() % 16];
                if (kind == 3) value = std::rint(value);
                if (kind == 4) value = random() % 4 ? 0.0f : value;
                if (kind == 5 && random() % 8 == 0) value = 0.0f;
                x(r, i) = std::clamp(std::ldexp(value, exponent), -0x1.fffffep127f, 0x1.fffffep127f);
            }
            if (kind == 5 && random() % 2)
                for (Index i = c; i < c + 16; ++i) x(r, i) = 0.0f;
        }
    return x;
}

TEST(Quantize, GivesTheBytesOfTheDefinition) {
    for (const bool wild : {false, true})
        for (const Index cols : {32, 480, 2080, 4704}) {
            const Matrix<float> weight = mixed(cols < 500 ? 300 : 9, cols, wild, static_cast<unsigned>(cols));
            for (const float tensor_scale : {100.0f, 7e5f, 1e-3f})
                for (const bool bfloat16 : {false, true}) expect_the_definition<Nvfp4>(weight, {ScaleSearch::absmax, MxRule::even, bfloat16}, tensor_scale);
            for (const MxRule rule : {MxRule::floor, MxRule::ceil, MxRule::even, MxRule::four_thirds}) expect_the_definition<Mxfp4>(weight, {ScaleSearch::absmax, rule, false}, mx_tensor_scale(rule));
        }
}

TEST(Searches, GiveTheScalesOfTheDefinition) {
    for (const bool wild : {false, true}) {
        const Matrix<float> weight = mixed(150, 1056, wild, 7);
        for (const float tensor_scale : {100.0f, 7e5f, 1e-3f}) expect_the_definition<Nvfp4>(weight, {ScaleSearch::mse, MxRule::even, false}, tensor_scale);
        for (const MxRule rule : {MxRule::floor, MxRule::ceil, MxRule::even, MxRule::four_thirds}) expect_the_definition<Mxfp4>(weight, {ScaleSearch::mse, rule, false}, mx_tensor_scale(rule));
        const Matrix<float> fewer = mixed(100, 544, wild, 8);
        expect_the_definition<Nvfp4>(fewer, {ScaleSearch::fpquant_mse, MxRule::even, false}, 100.0f);
        expect_the_definition<Nvfp4>(fewer, {ScaleSearch::fpquant_mse, MxRule::even, true}, 100.0f);
        for (const MxRule rule : {MxRule::even, MxRule::four_thirds}) expect_the_definition<Mxfp4>(fewer, {ScaleSearch::fpquant_mse, rule, false}, mx_tensor_scale(rule));
    }
}

TEST(Searches, FindTheScaleThatClipsOneLargeValueForManyEqualOnes) {
    Matrix<float> x(31, 300 * 32);
    for (Index r = 0; r < 31; ++r)
        for (Index g = 0; g < 300; ++g) {
            x(r, 32 * g) = x(r, 32 * g + 16) = 6.0f;
            for (Index i = 1; i <= r + 1 && i < 32; ++i)
                if (i != 16) x(r, 32 * g + i) = 2.0f + 0.0133f * static_cast<float>(g);
        }
    for (const ScaleSearch search : {ScaleSearch::mse, ScaleSearch::fpquant_mse}) {
        expect_the_definition<Nvfp4>(x, {search, MxRule::even, false}, 100.0f);
        expect_the_definition<Mxfp4>(x, {search, MxRule::even, false}, 1.0f);
    }
}

// ---- Rotations

TEST(Butterflies, AddAsTheDefinitionForEveryBlockSize) {
    for (Index k = 2; k <= 8192; k *= 2) {
        const Index cols = k <= 32 ? 7 * k : 3 * k;  // narrow blocks leave some over
        const Matrix<float> x = random_matrix(11, cols, static_cast<unsigned>(k));
        Matrix<float> expected = x, rotated(11, cols);
        const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(k)));
        for (Index r = 0; r < 11; ++r) {
            for (Index c = 0; c < cols; c += k) butterflies(expected.view().row(r) + c, k);
            for (Index c = 0; c < cols; ++c) expected(r, c) *= factor;
        }
        for (const int threads : thread_counts) {
            EXPECT_EQ(rotate_columns(x.view(), k, rotated.view(), threads), -1);
            ASSERT_EQ(rotated, expected) << k;
            Matrix<float> in_place = x;
            rotate_columns(in_place.view(), k, in_place.view(), threads);
            ASSERT_EQ(in_place, expected) << k;
        }
        float largest = 0;
        for (Index r = 0; r < 11; ++r)
            for (Index c = 0; c < cols; ++c) largest = std::max(largest, std::fabs(expected(r, c)));
        EXPECT_EQ(amax(x.view(), 2, k), largest) << k;
    }
}

TEST(Butterflies, AnOverflowInAnyBlockIsRefused) {
    for (const Index k : {2, 16, 128, 1024})
        for (Index block = 0; block < 3; ++block) {
            Matrix<float> x(3, 3 * k), out(3, 3 * k);
            for (Index c = 0; c < k; ++c) x(1, block * k + c) = 3e38f;
            testing::expect_refused("row 1 overflows float32", [&] { rotate_columns(x.view(), k, out.view(), 1); });
            testing::expect_refused("row 1 overflows float32", [&] { amax(x.view(), 1, k); });
        }
}

TEST(RotateAndQuantize, GivesTheBytesOfTheTwoPasses) {
    for (const char* format : {"nvfp4", "mxfp4"})
        for (const Index k : {2, 16, 32, 128, 1024, 4096}) {
            const Index cols = std::max<Index>(4096, k) + std::max<Index>(k, 32), group = format[0] == 'n' ? 16 : 32;
            const float tensor_scale = format[0] == 'n' ? 100.0f : 1.0f;
            const Matrix<float> x = random_matrix(5, cols);
            Matrix<float> rotated(5, cols), values(5, cols), expected_values(5, cols);
            Matrix<std::uint8_t> scales(5, cols / group), codes(5, cols / 2), expected_scales(5, cols / group), expected_codes(5, cols / 2);
            rotate_columns(x.view(), k, rotated.view(), 1);
            quantize(format, {}, rotated.view(), tensor_scale, expected_codes.view(), expected_scales.view(), 1);
            dequantize(format, expected_codes.view(), expected_scales.view(), tensor_scale, expected_values.view(), 1);
            for (const int threads : thread_counts) {
                EXPECT_EQ(quantize(format, {}, x.view(), tensor_scale, codes.view(), scales.view(), threads, k), -1);
                EXPECT_EQ(codes, expected_codes);
                EXPECT_EQ(scales, expected_scales);
                EXPECT_EQ(round_to_grid(format, {}, x.view(), tensor_scale, values.view(), threads, k), -1);
                EXPECT_EQ(values, expected_values);
            }
        }
}

TEST(Quantize, NamesTheFirstValueThatIsNotFinite) {
    Matrix<float> x = random_matrix(40, 1120), out(40, 1120);
    Matrix<std::uint8_t> codes(40, 560), scales(40, 70);
    const auto expect_position = [&](Index position) {
        for (const int threads : thread_counts)
            for (const Index k : {0, 16}) {
                EXPECT_EQ(quantize("nvfp4", {}, x.view(), 100.0f, codes.view(), scales.view(), threads, k), position);
                EXPECT_EQ(round_to_grid("nvfp4", {}, x.view(), 100.0f, out.view(), threads, k), position);
                if (k) {
                    EXPECT_EQ(rotate_columns(x.view(), k, out.view(), threads), position);
                }
                EXPECT_EQ(std::isfinite(amax(x.view(), threads, k)), position < 0);
            }
    };
    expect_position(-1);
    x(30, 1119) = INFINITY;  // in the groups left over
    expect_position(30 * 1120 + 1119);
    x(30, 7) = NAN;
    x(31, 0) = NAN;
    expect_position(30 * 1120 + 7);
    x(9, 600) = -INFINITY;
    expect_position(9 * 1120 + 600);
}

}  // namespace
}  // namespace mrgptq
