// Products with packed weights against the chains that they claim to be, for every layout and number of threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string_view>
#include <utility>

#include "codecs/scale_rule.h"
#include "formats/block_format.h"
#include "guarded.h"
#include "matmul/integer.h"
#include "matmul/matmul.h"
#include "matrices.h"
#include "refusal.h"
#include "tiled.h"

namespace mrgptq {
namespace {

using testing::chained, testing::expect_refused, testing::in_both_forms, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::thread_counts, testing::Tiled;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

struct Blocks {
    std::string_view format;
    Matrix<std::uint8_t> codes, scales;
    float tensor_scale;

    // Scales from `least` on, `kinds` of them; one format's usual ones unless told.
    Blocks(std::string_view format, Index rows, Index cols, Index group_size, unsigned least, unsigned kinds, float tensor_scale = 3)
        : format(format), codes(rows, cols / 2), scales(rows, cols / group_size), tensor_scale(tensor_scale) {
        std::mt19937 generator(7);
        for (Index r = 0; r < rows; ++r) {
            for (Index c = 0; c < codes.view().cols; ++c) codes(r, c) = static_cast<std::uint8_t>(generator());
            for (Index c = 0; c < scales.view().cols; ++c) scales(r, c) = static_cast<std::uint8_t>(least + generator() % kinds);
        }
    }
    Blocks(std::string_view format, Index rows, Index cols, Index group_size) : Blocks(format, rows, cols, group_size, group_size == 16 ? 40 : 120, 16) {}
    PackedMatrix view() const { return {format, codes.view(), scales.view(), tensor_scale}; }
};

// The definition.
Matrix<float> product(const Matrix<float>& x, const Blocks& w) {
    const Index tokens = x.view().rows, rows = w.codes.view().rows, cols = x.view().cols, size = cols / w.scales.view().cols;
    Matrix<float> y(tokens, rows);
    with_format(w.format, [&]<class Format>(Format) {
        for (Index t = 0; t < tokens; ++t)
            for (Index r = 0; r < rows; ++r)
                for (Index begin = 0; begin < cols; begin += 128) {
                    float chunk = 0;
                    for (Index group = begin / size; group < std::min<Index>(begin + 128, cols) / size; ++group) {
                        float sum = 0;
                        for (Index c = group * size; c < (group + 1) * size; ++c) sum = chained(2 * e2m1::decode(static_cast<std::uint8_t>(w.codes(r, c / 2) >> (c % 2 * 4) & 15)), x(t, c), sum);
                        chunk = chained(sum, group_step<Format>(w.scales(r, group), w.tensor_scale) / 2, chunk);
                    }
                    y(t, r) += chunk;
                }
    });
    return y;
}

// The answers to its first tokens alone, as many as are said.
void expect_product(const Matrix<float>& x, const Blocks& w, const Matrix<float>& expected, Index tokens) {
    const Index rows = w.codes.view().rows;
    Matrix<float> first(tokens, rows);
    for (Index t = 0; t < tokens; ++t) std::copy_n(expected.view().row(t), rows, first.view().row(t));
    in_both_forms(w.view(), [&](const Weight& weight) {
        Matrix<float> out(tokens, rows, layouts[0], nan);
        matmul({x.view().row(0), tokens, x.view().cols, x.view().row_stride}, weight, out.view(), 1);
        ASSERT_EQ(out, first) << w.format << " " << rows << " x " << x.view().cols << ", " << tokens << " tokens, divisor " << w.tensor_scale << (weight.tiled ? ", tiled" : "");
    });
}

constexpr std::pair<std::string_view, Index> formats[] = {{"nvfp4", 16}, {"mxfp4", 32}};

TEST(Products, AreSumsOfGroupsAndChunks) {
    for (const auto& [format, group_size] : formats)
        for (const Index cols : {16, 32, 112, 128, 160, 288, 1056, 2208})
            for (const Index rows : {1, 31, 40, 64, 133}) {
                if (cols % group_size != 0) continue;
                const Blocks w(format, rows, cols, group_size);
                const Matrix<float> x = random_matrix(13, cols), expected = product(x, w);
                for (const Index tokens : {1, 2, 3, 4, 5, 8, 13}) expect_product(x, w, expected, tokens);
            }
}

// Zeros, subnormal steps, negative ones, and whatever the divisor makes of them: all scales that are numbers, and the usual ones with one among them that is none of these.
TEST(Products, ReadEveryScale) {
    const Index rows = 71, cols = 2208;
    for (const auto& [format, group_size] : formats)
        for (const float tensor_scale : {1.0f, 3.0f, 0.7f, 0x1p-60f, 0x1.8p100f, 0x1p-126f}) {
            const Matrix<float> x = random_matrix(5, cols);
            for (const auto& [least, kinds] : {std::pair{0u, 127u}, std::pair{group_size == 16 ? 128u : 60u, 127u}, std::pair{0u, 16u}}) {
                const Blocks w(format, rows, cols, group_size, least, kinds, tensor_scale);
                const Matrix<float> expected = product(x, w);
                for (const Index tokens : {1, 2, 3, 4, 5}) expect_product(x, w, expected, tokens);
            }
            for (const Index group : {0, 9, 47, 64, 68}) {
                Blocks w(format, rows, cols, group_size, group_size == 16 ? 40 : 120, 16, tensor_scale);
                for (const Index r : {0, 17, 66}) w.scales(r, group) = static_cast<std::uint8_t>(r % 2 == 0 ? 0 : 3);
                const Matrix<float> expected = product(x, w);
                for (const Index tokens : {1, 4, 5}) expect_product(x, w, expected, tokens);
            }
        }
}

TEST(Products, OfAScaleThatIsNoNumberAreNone) {
    for (const auto& [format, group_size] : formats)
        for (const int byte : {127, 255})
            for (const Index tokens : {1, 4, 5}) {
                if (byte == 127 && format == "mxfp4") continue;  // which is 1
                Blocks w(format, 70, 2208, group_size);
                const Matrix<float> x = random_matrix(tokens, 2208);
                const Matrix<float> expected = product(x, w);
                w.scales(33, 41) = static_cast<std::uint8_t>(byte);
                in_both_forms(w.view(), [&](const Weight& weight) {
                    Matrix<float> out(tokens, 70);
                    matmul(x.view(), weight, out.view(), 1);
                    for (Index t = 0; t < tokens; ++t) {
                        EXPECT_TRUE(std::isnan(out(t, 33)));
                        out(t, 33) = expected(t, 33);
                    }
                    EXPECT_EQ(out, expected);
                });
            }
}

// With so many tokens one thread takes up to four tiles of rows together, here four, one, and a part of another.
TEST(Products, OfManyTokensTakeSeveralTilesTogether) {
    for (const auto& [format, group_size] : formats) {
        const Blocks w(format, 530, 288, group_size);
        const Matrix<float> x = random_matrix(67, 288);
        expect_product(x, w, product(x, w), 67);
    }
}

#if defined(__linux__)
// A last tile that has none beside it, before memory that nobody may read.
TEST(Products, ReadNothingBehindTheLastTile) {
    const Blocks w("nvfp4", 70, 288, 16);  // three tiles, of which two are in hand together
    const Tiled tiled(w.view());
    const testing::Guarded codes(tiled.codes), scales(tiled.scales);
    const TiledMatrix guarded{"nvfp4", 70, codes.view(), scales.view(), w.tensor_scale};
    for (const Index tokens : {1, 4, 5}) {
        const Matrix<float> x = random_matrix(tokens, 288);
        Matrix<float> out(tokens, 70);
        matmul(x.view(), guarded, out.view(), 1);
        EXPECT_EQ(out, product(x, w));
        matmul_int8(x.view(), guarded, out.view(), 1);
    }
}
#endif

TEST(Products, DoNotDependOnLayoutAndNumberOfThreads) {
    const Index rows = 331, cols = 1184;
    for (const auto& [format, group_size] : formats)
        for (const Index tokens : {1, 2, 3, 4, 13}) {
            const Blocks w(format, rows, cols, group_size);
            const Matrix<float> x = random_matrix(tokens, cols);
            Matrix<float> expected(tokens, rows);
            matmul(x.view(), w.view(), expected.view(), 1);
            for (const Layout layout : layouts)
                for (const int threads : thread_counts) {
                    const Matrix<float> in(x, layout, nan);
                    const Matrix<std::uint8_t> codes(w.codes, layout, 0x77), scales(w.scales, layout, 0x77);
                    const PackedMatrix by_rows{format, codes.view(), scales.view(), w.tensor_scale};
                    const Tiled tiled(by_rows, layout);
                    for (const Weight& weight : {Weight(by_rows), Weight(tiled.view())}) {
                        Matrix<float> out(tokens, rows, layout, nan);
                        matmul(in.view(), weight, out.view(), threads);
                        EXPECT_EQ(out, expected);
                        EXPECT_TRUE(out.padding_untouched());
                    }
                }
        }
}

TEST(Products, OfNothing) {
    const Blocks w("nvfp4", 5, 32, 16);
    Matrix<float> out(0, 5);
    matmul(Matrix<float>(0, 32).view(), w.view(), out.view(), 2);
}

TEST(Products, Refuse) {
    const Blocks w("nvfp4", 5, 32, 16);
    Matrix<float> out(2, 5), narrow(2, 4);
    expect_refused("x has 48 columns; the weight has 32", [&] { matmul(Matrix<float>(2, 48).view(), w.view(), out.view(), 1); });
    expect_refused("out has shape (2, 4); the product has (2, 5)", [&] { matmul(Matrix<float>(2, 32).view(), w.view(), narrow.view(), 1); });
    expect_refused("scales do not have one entry for each group", [&] { matmul(Matrix<float>(2, 32).view(), PackedMatrix{"mxfp4", w.codes.view(), w.scales.view()}, out.view(), 1); });
    const Matrix<std::uint32_t> tiles(1, 4 * 32), scale_tiles(1, 32), two_tiles(2, 32);
    for (const TiledMatrix& wrong : {TiledMatrix{"nvfp4", 33, tiles.view(), scale_tiles.view()}, TiledMatrix{"nvfp4", 32, tiles.view(), tiles.view()}, TiledMatrix{"nvfp4", 32, tiles.view(), two_tiles.view()}})
        expect_refused("tiles of codes and scales do not fit", [&] { matmul(Matrix<float>(2, 32).view(), wrong, Matrix<float>(2, wrong.rows).view(), 1); });
    expect_refused("unknown format \"fp8\"", [&] { matmul(Matrix<float>(2, 32).view(), PackedMatrix{"fp8", w.codes.view(), w.scales.view()}, out.view(), 1); });
}

}  // namespace
}  // namespace mrgptq
