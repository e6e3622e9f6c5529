// Products with packed weights against the chains that they claim to be, for every layout and number of threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <string_view>
#include <utility>

#include "codecs/codec.h"
#include "formats/block_format.h"
#include "matmul/matmul.h"
#include "matrices.h"
#include "refusal.h"

namespace mrgptq {
namespace {

using testing::chained, testing::expect_refused, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::thread_counts;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

struct Weight {
    std::string_view format;
    Matrix<std::uint8_t> codes, scales;
    float tensor_scale = 3;

    Weight(std::string_view format, Index rows, Index cols, Index group_size) : format(format), codes(rows, cols / 2), scales(rows, cols / group_size) {
        std::mt19937 generator(7);
        for (Index r = 0; r < rows; ++r) {
            for (Index c = 0; c < codes.view().cols; ++c) codes(r, c) = static_cast<std::uint8_t>(generator());
            for (Index c = 0; c < scales.view().cols; ++c) scales(r, c) = static_cast<std::uint8_t>((group_size == 16 ? 40 : 120) + generator() % 16);
        }
    }
    PackedMatrix view() const { return {format, codes.view(), scales.view(), tensor_scale}; }
};

constexpr std::pair<std::string_view, Index> formats[] = {{"nvfp4", 16}, {"mxfp4", 32}};

// Of random tokens, against the definition.
void expect_chains(const Weight& w, Index tokens) {
    const Index rows = w.codes.view().rows, cols = 2 * w.codes.view().cols;
    const Matrix<float> x = random_matrix(tokens, cols);
    Matrix<float> values(rows, cols), expected(tokens, rows), out(tokens, rows, layouts[0], nan);
    dequantize(w.format, w.codes.view(), w.scales.view(), w.tensor_scale, values.view(), 1);
    for (Index t = 0; t < tokens; ++t)
        for (Index r = 0; r < rows; ++r)
            for (Index begin = 0; begin < cols; begin += 128) {
                float chain = 0;
                for (Index c = begin; c < std::min<Index>(begin + 128, cols); ++c) chain = chained(values(r, c), x(t, c), chain);
                expected(t, r) += chain;
            }
    matmul(x.view(), w.view(), out.view(), 1);
    ASSERT_EQ(out, expected) << w.format << " " << rows << " x " << cols << ", " << tokens << " tokens";
}

TEST(Products, AreChainsOf128) {
    for (const auto& [format, group_size] : formats)
        for (const Index cols : {32, 128, 160, 288, 2080})  // scales of up to four are turned a cache line of a row at a time, for 1024 or 2048 columns
            for (const Index rows : {1, 31, 40, 131})
                for (const Index tokens : {1, 2, 3, 4, 5, 8, 13}) expect_chains(Weight(format, rows, cols, group_size), tokens);
}

TEST(Products, OfEveryScaleThatStoresAFiniteStep) {
    for (const auto& [format, group_size] : formats)
        for (const Index tokens : {1, 4, 5}) {
            Weight w(format, 16, 512 * group_size / 16, group_size);
            for (Index r = 0; r < 16; ++r)
                for (Index g = 0; g < 32; ++g) w.scales(r, g) = static_cast<std::uint8_t>((32 * r + g) % (group_size == 16 ? 127 : 240));  // beyond 240 a sum overflows
            expect_chains(w, tokens);
        }
}

TEST(Products, DoNotDependOnLayoutAndNumberOfThreads) {
    const Index rows = 71, cols = 288;
    for (const Index tokens : {1, 3, 13})
        for (const auto& [format, group_size] : formats) {
            const Weight w(format, rows, cols, group_size);
            const Matrix<float> x = random_matrix(tokens, cols);
            Matrix<float> expected(tokens, rows);
            matmul(x.view(), w.view(), expected.view(), 1);
            for (const Layout layout : layouts)
                for (const int threads : thread_counts) {
                    const Matrix<float> in(x, layout, nan);
                    const Matrix<std::uint8_t> codes(w.codes, layout, 0x77), scales(w.scales, layout, 0x77);
                    Matrix<float> out(tokens, rows, layout, nan);
                    matmul(in.view(), {format, codes.view(), scales.view(), w.tensor_scale}, out.view(), threads);
                    EXPECT_EQ(out, expected);
                    EXPECT_TRUE(out.padding_untouched());
                }
        }
}

TEST(Products, OfNothing) {
    const Weight w("nvfp4", 5, 32, 16);
    Matrix<float> out(0, 5);
    matmul(Matrix<float>(0, 32).view(), w.view(), out.view(), 2);
}

TEST(Products, Refuse) {
    const Weight w("nvfp4", 5, 32, 16);
    Matrix<float> out(2, 5), narrow(2, 4);
    expect_refused("x has 48 columns; the weight has 32", [&] { matmul(Matrix<float>(2, 48).view(), w.view(), out.view(), 1); });
    expect_refused("out has shape (2, 4); the product has (2, 5)", [&] { matmul(Matrix<float>(2, 32).view(), w.view(), narrow.view(), 1); });
    expect_refused("scales do not have one entry for each group", [&] { matmul(Matrix<float>(2, 32).view(), {"mxfp4", w.codes.view(), w.scales.view()}, out.view(), 1); });
    expect_refused("unknown format \"fp8\"", [&] { matmul(Matrix<float>(2, 32).view(), {"fp8", w.codes.view(), w.scales.view()}, out.view(), 1); });
}

}  // namespace
}  // namespace mrgptq
