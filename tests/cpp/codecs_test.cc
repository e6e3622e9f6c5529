// The codecs over every layout and number of threads, which must not reach the bytes, and what they refuse.
#include "codecs/codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "codecs/packing.h"
#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::contiguous, testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::thread_counts;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr Index rows = 37, cols = 96;  // neither a multiple of the rows that a thread takes at a time
constexpr MatrixView<const double> no_hessian{nullptr, 0, 0, 0};

struct Case {
    const char* format;
    Index group_size;
    ScaleRule rule;
    float tensor_scale;
};

class Codec : public ::testing::TestWithParam<Case> {
protected:
    const Case c = GetParam();
    Matrix<float> weight = random_matrix(rows, cols);
    Matrix<std::uint8_t> scales{rows, cols / c.group_size}, codes{rows, cols / 2};
    Matrix<float> values{rows, cols}, rounded{rows, cols};

    void SetUp() override {
        find_scales(c.format, c.rule, weight.view(), c.tensor_scale, no_hessian, scales.view(), 1);
        encode(c.format, weight.view(), scales.view(), c.tensor_scale, codes.view(), 1);
        dequantize(c.format, codes.view(), scales.view(), c.tensor_scale, values.view(), 1);
        round_to_grid(c.format, c.rule, weight.view(), c.tensor_scale, rounded.view(), 1);
    }
};

INSTANTIATE_TEST_SUITE_P(
    Rules, Codec,
    ::testing::Values(Case{"nvfp4", 16, {ScaleSearch::absmax, MxRule::even, false}, 100.0f}, Case{"nvfp4", 16, {ScaleSearch::absmax, MxRule::even, true}, 100.0f},
                      Case{"nvfp4", 16, {ScaleSearch::fpquant_mse, MxRule::even, false}, 100.0f}, Case{"mxfp4", 32, {ScaleSearch::absmax, MxRule::floor, false}, 1.0f},
                      Case{"mxfp4", 32, {ScaleSearch::absmax, MxRule::ceil, false}, 1.0f}, Case{"mxfp4", 32, {ScaleSearch::absmax, MxRule::even, false}, 1.0f},
                      Case{"mxfp4", 32, {ScaleSearch::absmax, MxRule::four_thirds, false}, 3.0f}, Case{"mxfp4", 32, {ScaleSearch::fpquant_mse, MxRule::even, false}, 1.0f},
                      Case{"nvfp4", 16, {ScaleSearch::mse, MxRule::even, false}, 100.0f}, Case{"nvfp4", 16, {ScaleSearch::four_over_six, MxRule::even, false}, 100.0f},
                      Case{"mxfp4", 32, {ScaleSearch::mse, MxRule::even, false}, 1.0f}, Case{"mxfp4", 32, {ScaleSearch::mse, MxRule::four_thirds, false}, 3.0f},
                      Case{"mxfp4", 32, {ScaleSearch::quest, MxRule::even, false}, 1.0f}));

TEST_P(Codec, LayoutAndThreadsDoNotReachTheBytes) {
    for (const Layout in : layouts)
        for (const Layout out : layouts)
            for (const int threads : thread_counts) {
                const Matrix<float> w(weight, in, nan);
                Matrix<std::uint8_t> s(rows, cols / c.group_size, out, 0xEE), q(rows, cols / 2, out, 0xEE);
                Matrix<float> v(rows, cols, out, nan), r(rows, cols, out, nan);
                find_scales(c.format, c.rule, w.view(), c.tensor_scale, no_hessian, s.view(), threads);
                encode(c.format, w.view(), s.view(), c.tensor_scale, q.view(), threads);
                dequantize(c.format, q.view(), s.view(), c.tensor_scale, v.view(), threads);
                round_to_grid(c.format, c.rule, w.view(), c.tensor_scale, r.view(), threads);
                EXPECT_EQ(s, scales);
                EXPECT_EQ(q, codes);
                EXPECT_EQ(v, values);
                EXPECT_EQ(r, rounded);
                EXPECT_TRUE(s.padding_untouched() && q.padding_untouched() && v.padding_untouched() && r.padding_untouched());
            }
}

TEST_P(Codec, RoundsInPlace) {
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) {
            Matrix<float> x(weight, layout, nan);
            round_to_grid(c.format, c.rule, x.view(), c.tensor_scale, x.view(), threads);
            EXPECT_EQ(x, rounded);
            EXPECT_TRUE(x.padding_untouched());
        }
}

TEST_P(Codec, RoundingIsEncodingAndDecoding) {
    EXPECT_EQ(rounded, values);
    // A group's values do not depend on its neighbours: a matrix of that group alone gives the same.
    for (Index g = 0; g < cols / c.group_size; ++g) {
        Matrix<float> alone(1, c.group_size);
        for (Index j = 0; j < c.group_size; ++j) alone(0, j) = weight(5, g * c.group_size + j);
        round_to_grid(c.format, c.rule, alone.view(), c.tensor_scale, alone.view(), 1);
        for (Index j = 0; j < c.group_size; ++j) EXPECT_EQ(alone(0, j), rounded(5, g * c.group_size + j));
    }
}

TEST_P(Codec, NoRowsAreNoWork) {
    Matrix<float> none(0, cols);
    Matrix<std::uint8_t> no_scales(0, cols / c.group_size), no_codes(0, cols / 2);
    find_scales(c.format, c.rule, none.view(), c.tensor_scale, no_hessian, no_scales.view(), 2);
    encode(c.format, none.view(), no_scales.view(), c.tensor_scale, no_codes.view(), 2);
    dequantize(c.format, no_codes.view(), no_scales.view(), c.tensor_scale, none.view(), 2);
    round_to_grid(c.format, c.rule, none.view(), c.tensor_scale, none.view(), 2);
}

TEST_P(Codec, RefusesShapesThatDoNotFit) {
    Matrix<float> narrow(rows, cols - 8), short_by_one(rows - 1, cols);
    Matrix<std::uint8_t> more_scales(rows, cols / c.group_size + 1), fewer_codes(rows, cols / 2 - 1);
    const std::string group = std::to_string(c.group_size), wanted = "(37, " + std::to_string(cols / c.group_size) + ")";
    expect_refused("weight has 88 columns; the format needs a multiple of " + group, [&] { find_scales(c.format, c.rule, narrow.view(), 1, no_hessian, scales.view(), 1); });
    expect_refused("weight needs " + wanted, [&] { find_scales(c.format, c.rule, weight.view(), 1, no_hessian, more_scales.view(), 1); });
    expect_refused("weight needs " + wanted, [&] { encode(c.format, weight.view(), more_scales.view(), 1, codes.view(), 1); });
    expect_refused("codes have shape (37, 47)", [&] { encode(c.format, weight.view(), scales.view(), 1, fewer_codes.view(), 1); });
    expect_refused("codes have shape (37, 47)", [&] { dequantize(c.format, fewer_codes.view(), scales.view(), 1, values.view(), 1); });
    expect_refused("codes needs " + wanted, [&] { dequantize(c.format, codes.view(), more_scales.view(), 1, values.view(), 1); });
    expect_refused("out has another shape", [&] { round_to_grid(c.format, c.rule, weight.view(), 1, short_by_one.view(), 1); });
    expect_refused("x has 88 columns; " + std::string(c.format) + " needs a multiple of " + group, [&] { round_to_grid(c.format, c.rule, narrow.view(), 1, narrow.view(), 1); });
    expect_refused("unknown format \"fp4\"; known: mxfp4, nvfp4", [&] { find_scales("fp4", c.rule, weight.view(), 1, no_hessian, scales.view(), 1); });
}

// ---- Scales whose errors a Hessian weighs

class WeightedScales : public ::testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(Formats, WeightedScales,
                         ::testing::Values(Case{"nvfp4", 16, {ScaleSearch::hessian, MxRule::even, false}, 100.0f}, Case{"nvfp4", 16, {ScaleSearch::hessian_block, MxRule::even, false}, 100.0f},
                                           Case{"mxfp4", 32, {ScaleSearch::hessian, MxRule::floor, false}, 1.0f}, Case{"mxfp4", 32, {ScaleSearch::hessian_block, MxRule::four_thirds, false}, 3.0f}));

TEST_P(WeightedScales, LayoutAndThreadsDoNotReachTheBytesAndOnlyWhatTheRuleWeighsIsRead) {
    const Case c = GetParam();
    const Matrix<float> weight = random_matrix(rows, cols);
    const Matrix<double> full = testing::random_second_moment(cols);
    Matrix<double> h(cols, c.group_size);
    for (Index i = 0; i < cols; ++i)
        for (Index j = 0; j < c.group_size; ++j) h(i, j) = full(i, i / c.group_size * c.group_size + j);
    Matrix<std::uint8_t> expected(rows, cols / c.group_size), unweighed(rows, cols / c.group_size);
    find_scales(c.format, c.rule, weight.view(), c.tensor_scale, h.view(), expected.view(), 1);
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) {
            const Matrix<float> w(weight, layout, nan);
            Matrix<double> groups(h, layout, std::numeric_limits<double>::quiet_NaN());
            for (Index i = 0; i < cols && c.rule.search == ScaleSearch::hessian; ++i)
                for (Index j = 0; j < c.group_size; ++j)
                    if (i % c.group_size != j) groups(i, j) = nan;
            Matrix<std::uint8_t> s(rows, cols / c.group_size, layout, 0xEE);
            find_scales(c.format, c.rule, w.view(), c.tensor_scale, groups.view(), s.view(), threads);
            EXPECT_EQ(s, expected);
            EXPECT_TRUE(s.padding_untouched());
        }
    find_scales(c.format, {ScaleSearch::mse, c.rule.mx, false}, weight.view(), c.tensor_scale, no_hessian, unweighed.view(), 1);
    EXPECT_FALSE(unweighed == expected);  // the weights do count
    // Errors weighed alike are mse's: by powers of two, so that no product rounds.
    Matrix<double> equal(cols, c.group_size);
    for (Index i = 0; i < cols; ++i) equal(i, i % c.group_size) = 0x1p-7;
    find_scales(c.format, c.rule, weight.view(), c.tensor_scale, equal.view(), expected.view(), 3);
    EXPECT_EQ(expected, unweighed);
}

TEST_P(WeightedScales, NeedAHessianOfTheirSize) {
    const Case c = GetParam();
    Matrix<float> weight = random_matrix(rows, cols);
    Matrix<std::uint8_t> scales(rows, cols / c.group_size);
    const std::string group = std::to_string(c.group_size);
    expect_refused("weighs errors by what a hessian holds of each group, (96, " + group + "); got (0, 0)", [&] { find_scales(c.format, c.rule, weight.view(), c.tensor_scale, no_hessian, scales.view(), 1); });
    expect_refused("got (96, 95)", [&] { find_scales(c.format, c.rule, weight.view(), c.tensor_scale, Matrix<double>(96, 95).view(), scales.view(), 1); });
    expect_refused("got (95, " + group + ")", [&] { find_scales(c.format, c.rule, weight.view(), c.tensor_scale, Matrix<double>(95, c.group_size).view(), scales.view(), 1); });
}

template <class Format>
void expect_moves_inside(int lowest, int highest, float tensor_scale) {
    for (int bits = lowest; bits <= highest; ++bits)
        for (int offset = -130; offset <= 130; ++offset) {
            const std::uint8_t moved = moved_scale<Format>(static_cast<std::uint8_t>(bits), offset, tensor_scale);
            ASSERT_EQ(moved, std::min(std::max(bits + offset, lowest), highest));
            const float step = group_step<Format>(moved, tensor_scale);
            ASSERT_TRUE(step > 0 && 6 * step < infinity);
        }
}

TEST(MovedScale, StaysPositiveAndFiniteWhateverTheOffset) {
    expect_moves_inside<Nvfp4>(1, 0x7E, 100.0f);       // E4M3: 0 is no scale, 0x7F is NaN
    expect_moves_inside<Mxfp4>(0, 127 + 125, 1.0f);    // 6 * 2^126 overflows float32
    expect_moves_inside<Mxfp4>(0, 127 + 126, 3.0f);    // 6 * 2^126 / 3 does not, 6 * 2^127 / 3 does
    EXPECT_EQ(6 * std::ldexp(1.0f, 126), infinity);
    EXPECT_EQ(6 * (std::ldexp(1.0f, 127) / 3), infinity);
}

TEST(SearchStart, IsAbsmaxButForANvfp4ScaleThatWouldVanish) {
    EXPECT_EQ(search_start<Nvfp4>(6.0f, MxRule::even, 1.0f), 0x38);              // 6 / 6 = 1 = 0b0'0111'000
    EXPECT_EQ(search_start<Nvfp4>(6e9f, MxRule::even, 1.0f), 0x7E);              // saturated at 448
    EXPECT_EQ(search_start<Nvfp4>(6e-9f, MxRule::even, 1.0f), 1);                // 1e-9 is far below half of 2^-9, the smallest
    EXPECT_EQ(search_start<Nvfp4>(0.0f, MxRule::even, 1.0f), 0x20);              // a group of zeros keeps compressed-tensors' 0.125
    EXPECT_EQ(search_start<Mxfp4>(7.0f, MxRule::even, 1.0f), 127 + 1);           // 1.75 * 2^2: one step up
    EXPECT_EQ(search_start<Mxfp4>(7.0f, MxRule::floor, 1.0f), 127);
    EXPECT_EQ(search_start<Mxfp4>(7.0f, MxRule::four_thirds, 3.0f), 127 + 2);    // 4/3 * 2^0 = 2^2 / 3
}

TEST(Names, UnknownOnesAreRefusedWithTheKnownOnes) {
    EXPECT_EQ(scale_search_named("absmax"), ScaleSearch::absmax);
    EXPECT_EQ(scale_search_named("fpquant_mse"), ScaleSearch::fpquant_mse);
    EXPECT_EQ(scale_search_named("mse"), ScaleSearch::mse);
    EXPECT_EQ(scale_search_named("hessian"), ScaleSearch::hessian);
    EXPECT_EQ(scale_search_named("hessian_block"), ScaleSearch::hessian_block);
    EXPECT_EQ(scale_search_named("four_over_six"), ScaleSearch::four_over_six);
    EXPECT_EQ(scale_search_named("quest"), ScaleSearch::quest);
    EXPECT_EQ(mx_rule_named("floor"), MxRule::floor);
    EXPECT_EQ(mx_rule_named("ceil"), MxRule::ceil);
    EXPECT_EQ(mx_rule_named("even"), MxRule::even);
    EXPECT_EQ(mx_rule_named("four-thirds"), MxRule::four_thirds);
    expect_refused("unknown scale search \"gptq\"; known: absmax, fpquant_mse, mse, hessian, hessian_block, four_over_six, quest", [] { scale_search_named("gptq"); });
    expect_refused("unknown MX rule \"four_thirds\"; known: floor, ceil, even, four-thirds", [] { mx_rule_named("four_thirds"); });
}

TEST(Amax, ReadsTheMatrixAndNothingElse) {
    Matrix<float> x = random_matrix(rows, cols);
    x(20, 95) = -1e6f;
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) EXPECT_EQ(amax(Matrix<float>(x, layout, infinity).view(), threads), 1e6f);
    EXPECT_EQ(amax(Matrix<float>(0, cols).view(), 2), 0.0f);
    EXPECT_EQ(amax(Matrix<float>(2, 3, contiguous, -0.0f).view(), 2), 0.0f);
}

TEST(FirstNonfinite, IsTheFirstInRowMajorOrder) {
    for (const Layout layout : layouts)
        for (const int threads : thread_counts) {
            Matrix<float> x(random_matrix(rows, cols), layout, nan);
            EXPECT_EQ(first_nonfinite(x.view(), threads), -1);
            x(36, 95) = -infinity;
            EXPECT_EQ(first_nonfinite(x.view(), threads), 36 * cols + 95);
            x(23, 7) = nan;  // same piece of work as the next, in a later row
            x(16, 50) = infinity;
            x(16, 90) = nan;
            EXPECT_EQ(first_nonfinite(x.view(), threads), 16 * cols + 50);
            x(0, 0) = std::numeric_limits<float>::signaling_NaN();
            EXPECT_EQ(first_nonfinite(x.view(), threads), 0);
        }
    EXPECT_EQ(first_nonfinite(Matrix<float>(0, cols).view(), 2), -1);
}

TEST(Packing, RoundTripsEveryPairWithTheEvenColumnLow) {
    std::uint8_t packed[256], codes[512], again[256];
    for (int i = 0; i < 256; ++i) packed[i] = static_cast<std::uint8_t>(i);
    unpack_row(packed, 512, codes);
    for (int i = 0; i < 256; ++i) {
        EXPECT_EQ(codes[2 * i], i % 16);
        EXPECT_EQ(codes[2 * i + 1], i / 16);
    }
    pack_row(codes, 512, again);
    for (int i = 0; i < 256; ++i) EXPECT_EQ(again[i], i);
}

}  // namespace
}  // namespace mrgptq
