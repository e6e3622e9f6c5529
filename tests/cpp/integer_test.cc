// Products of packed weights with rounded inputs against their definition, for every layout and number of threads: equal bytes on every level, since the expectations are the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/block_format.h"
#include "matmul/integer.h"
#include "matrices.h"
#include "refusal.h"
#include "tiled.h"

namespace mrgptq {
namespace {

using testing::expect_refused, testing::in_both_forms, testing::Layout, testing::layouts, testing::Matrix, testing::random_matrix, testing::thread_counts, testing::Tiled;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr std::pair<std::string_view, Index> formats[] = {{"nvfp4", 16}, {"mxfp4", 32}};

struct Blocks {
    std::string_view format;
    Index group_size;
    Matrix<std::uint8_t> codes, scales;
    float tensor_scale;

    // Scales from `least` on, `kinds` of them.
    Blocks(std::string_view format, Index group_size, Index rows, Index cols, unsigned least, unsigned kinds, float tensor_scale = 3)
        : format(format), group_size(group_size), codes(rows, cols / 2), scales(rows, cols / group_size), tensor_scale(tensor_scale) {
        std::mt19937 generator(static_cast<unsigned>(rows));
        for (Index r = 0; r < rows; ++r) {
            for (Index c = 0; c < codes.view().cols; ++c) codes(r, c) = static_cast<std::uint8_t>(generator());
            for (Index c = 0; c < scales.view().cols; ++c) scales(r, c) = static_cast<std::uint8_t>(least + generator() % kinds);
        }
    }

    PackedMatrix view() const { return {format, codes.view(), scales.view(), tensor_scale}; }

    int doubled(Index r, Index c) const { return static_cast<int>(2 * e2m1::decode(static_cast<std::uint8_t>(codes(r, c / 2) >> (c % 2 * 4)))); }
};

// One operand as the definition reads it.
struct Operand {
    Matrix<int> numbers;
    Matrix<float> scales;
    std::vector<double> powers;
};

Operand operand_of(const Blocks& blocks) {
    const Index rows = blocks.codes.view().rows, groups = blocks.scales.view().cols;
    Operand operand{Matrix<int>(rows, groups * blocks.group_size), Matrix<float>(rows, groups), std::vector<double>(static_cast<std::size_t>(rows), 1.0)};
    for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < groups * blocks.group_size; ++c) operand.numbers(r, c) = blocks.doubled(r, c);
        const std::uint8_t* bytes = blocks.scales.view().row(r);
        const int largest = *std::max_element(bytes, bytes + groups);
        for (Index g = 0; g < groups; ++g)
            operand.scales(r, g) = blocks.format == "nvfp4" ? e4m3::decode(bytes[g]) : largest - bytes[g] > 108 ? 0.0f : std::ldexp(1.0f, 45 + bytes[g] - largest);
        if (blocks.format == "mxfp4") operand.powers[static_cast<std::size_t>(r)] = std::ldexp(1.0, largest - 127 - 45);
    }
    return operand;
}

Operand operand_of(const Matrix<float>& x, Index size) {
    const Index rows = x.view().rows, groups = x.view().cols / size;
    Operand operand{Matrix<int>(rows, groups * size), Matrix<float>(rows, groups), std::vector<double>(static_cast<std::size_t>(rows))};
    for (Index r = 0; r < rows; ++r) {
        float largest = 0;
        for (Index g = 0; g < groups; ++g) {
            float amax = 0;
            for (Index c = g * size; c < (g + 1) * size; ++c) amax = std::max(amax, std::fabs(x(r, c)));
            const float step = operand.scales(r, g) = amax / 127;
            largest = std::max(largest, step);
            for (Index c = g * size; c < (g + 1) * size; ++c) operand.numbers(r, c) = step == 0 ? 0 : static_cast<int>(std::clamp(std::nearbyint(x(r, c) / step), -127.0f, 127.0f));
        }
        const int exponent = largest > 0 ? std::ilogb(largest) : 0;
        for (Index g = 0; g < groups; ++g) {
            const double relative = std::ldexp(static_cast<double>(operand.scales(r, g)), 45 - exponent);
            operand.scales(r, g) = relative < 0x1p-63 ? 0.0f : static_cast<float>(relative);
        }
        operand.powers[static_cast<std::size_t>(r)] = std::ldexp(1.0, exponent - 45);
    }
    return operand;
}

Matrix<float> product(const Operand& x, const Operand& w, double constant) {
    const Index tokens = x.numbers.view().rows, rows = w.numbers.view().rows, cols = w.numbers.view().cols, groups = std::max(x.scales.view().cols, w.scales.view().cols), size = cols / groups;
    Matrix<float> out(tokens, rows);
    for (Index t = 0; t < tokens; ++t)
        for (Index r = 0; r < rows; ++r) {
            float sum = 0;
            for (Index g = 0; g < groups; ++g) {
                int dot = 0;
                for (Index c = g * size; c < (g + 1) * size; ++c) dot += x.numbers(t, c) * w.numbers(r, c);
                const float scale = x.scales(t, g * x.scales.view().cols / groups) * w.scales(r, g * w.scales.view().cols / groups);
                sum += static_cast<float>(dot) * scale;
            }
            out(t, r) = static_cast<float>(sum * (constant * x.powers[static_cast<std::size_t>(t)] * w.powers[static_cast<std::size_t>(r)]));
        }
    return out;
}

constexpr std::pair<unsigned, unsigned> usual = {100, 20}, all = {0, 127}, upper = {128, 127};  // E4M3's upper ones are negative

TEST(IntegerProducts, OfPackedOperandsAreAsDefined) {
    for (const auto& [format, size] : formats)
        for (const auto& [inputs, inputs_size] : formats)
            for (const auto& [least, kinds] : {usual, all, upper})
                for (const Index cols : {32, 160, 544, 1056, 2208})
                    for (const Index rows : {1, 31, 40, 133})
                        for (const Index tokens : {1, 2, 3, 4, 5, 9}) {
                            if (rows > 40 && cols < 1056) continue;
                            const Blocks w(format, size, rows, cols, least, kinds), x(inputs, inputs_size, tokens, cols, least, kinds, 0.7f);
                            const Matrix<float> expected = product(operand_of(x), operand_of(w), 0.25 / (0.7f * 3.0));
                            in_both_forms(w.view(), [&](const Weight& weight) {
                                Matrix<float> out(tokens, rows, layouts[0], nan);
                                matmul_packed(x.view(), weight, out.view(), 1);
                                ASSERT_EQ(out, expected) << w.format << " by " << x.format << ", " << rows << " x " << cols << ", " << tokens << " tokens" << (weight.tiled ? ", tiled" : "");
                            });
                        }
}

TEST(IntegerProducts, OfEightBitInputsAreAsDefined) {
    for (const auto& [format, size] : formats)
        for (const Index cols : {32, 160, 544, 1056, 2208})
            for (const Index rows : {1, 31, 40, 133})
                for (const Index tokens : {1, 2, 3, 4, 5, 9}) {
                    const Blocks w(format, size, rows, cols, 100, 20);
                    Matrix<float> x = random_matrix(tokens, cols);
                    for (Index c = 0; c < 32; ++c) x(0, c) = std::ldexp(x(0, c), -140);  // too small to count, or alone
                    const Matrix<float> expected = product(operand_of(x, size), operand_of(w), 0.5 / 3);
                    in_both_forms(w.view(), [&](const Weight& weight) {
                        Matrix<float> out(tokens, rows, layouts[0], nan);
                        matmul_int8(x.view(), weight, out.view(), 1);
                        ASSERT_EQ(out, expected) << w.format << " " << rows << " x " << cols << ", " << tokens << " tokens" << (weight.tiled ? ", tiled" : "");
                    });
                }
}

TEST(IntegerProducts, HoldEightBitsWithin127AndLoseStepsBelowAll) {
    for (const auto& [format, size] : formats) {
        Blocks w(format, size, 40, 2 * size, format == "nvfp4" ? 0x38 : 127, 1, 1);
        for (Index r = 0; r < 40; ++r)
            for (Index c = 0; c < size / 2; ++c) w.codes(r, c) = 0;  // the second group alone counts
        Matrix<float> x(3, 2 * size), out(3, 40);
        for (Index c = 0; c < 2 * size; ++c) {
            x(0, c) = (c % 3 == 0 ? -130 : 130) * std::numeric_limits<float>::denorm_min();  // whose step is one of these, not 130 / 127
            x(1, c) = c < size ? 1 : -0x1p-112f;
            x(2, c) = c < size ? 1 : -0x1p-107f;
        }
        matmul_int8(x.view(), w.view(), out.view(), 1);
        EXPECT_EQ(out, product(operand_of(x, size), operand_of(w), 0.5));
        for (Index r = 0; r < 40; ++r) {
            int sum = 0, of_signs = 0;
            for (Index c = size; c < 2 * size; ++c) {
                sum += w.doubled(r, c);
                of_signs += c % 3 == 0 ? -w.doubled(r, c) : w.doubled(r, c);
            }
            EXPECT_EQ(out(0, r), static_cast<float>(127 * of_signs) / 2 * std::numeric_limits<float>::denorm_min());
            EXPECT_EQ(out(1, r), 0);
            EXPECT_EQ(out(2, r) == 0, sum == 0);
        }
    }
}

// Codes of the largest magnitude by bytes of the largest, all of one sign and of both: what is summed in sixteen bits must come back from what overflows there.
TEST(IntegerProducts, OfTheLargestNumbersAreExact) {
    for (const auto& [format, size] : formats)
        for (const int codes : {0x77, 0xFF, 0x7F, 0xF7, 0x00})
            for (const int inputs : {0x77, 0xFF, 0x7F, 0xF7, 0x00}) {
                Blocks w(format, size, 3, 64, format == "nvfp4" ? 0x38 : 127, 1, 1), x(format, size, 2, 64, format == "nvfp4" ? 0x38 : 127, 1, 1);  // every scale is 1
                Matrix<float> bytes(2, 64), out(2, 3), of_bytes(2, 3);
                for (Index c = 0; c < 32; ++c) {
                    for (Index r = 0; r < 3; ++r) w.codes(r, c) = static_cast<std::uint8_t>(codes);
                    for (Index t = 0; t < 2; ++t) x.codes(t, c) = static_cast<std::uint8_t>(inputs);
                }
                int dot = 0, dot_of_bytes = 0;
                for (Index c = 0; c < 64; ++c) {
                    const int sign = (x.doubled(0, c) > 0) - (x.doubled(0, c) < 0);
                    for (Index t = 0; t < 2; ++t) bytes(t, c) = static_cast<float>(127 * sign);
                    dot += w.doubled(0, c) * x.doubled(0, c);
                    dot_of_bytes += w.doubled(0, c) * 127 * sign;
                }
                in_both_forms(w.view(), [&](const Weight& weight) {
                    matmul_packed(x.view(), weight, out.view(), 1);
                    matmul_int8(bytes.view(), weight, of_bytes.view(), 1);
                    for (Index t = 0; t < 2; ++t)
                        for (Index r = 0; r < 3; ++r) {
                            EXPECT_EQ(out(t, r), static_cast<float>(dot) / 4);
                            EXPECT_EQ(of_bytes(t, r), static_cast<float>(dot_of_bytes) / 2);
                        }
                });
            }
}

// With so many tokens one thread takes up to four tiles of rows together, here four, one, and a part of another.
TEST(IntegerProducts, OfManyTokensTakeSeveralTilesTogether) {
    for (const auto& [format, size] : formats) {
        const Blocks w(format, size, 530, 544, 100, 20), x("nvfp4", 16, 67, 544, 100, 20, 0.7f);
        const Matrix<float> expected = product(operand_of(x), operand_of(w), 0.25 / (0.7f * 3.0));
        in_both_forms(w.view(), [&](const Weight& weight) {
            Matrix<float> out(67, 530, layouts[0], nan);
            matmul_packed(x.view(), weight, out.view(), 1);
            ASSERT_EQ(out, expected) << w.format << (weight.tiled ? ", tiled" : "");
        });
    }
}

TEST(IntegerProducts, DoNotDependOnLayoutAndNumberOfThreads) {
    const Index rows = 331, cols = 1184;
    for (const auto& [format, size] : formats)
        for (const Index tokens : {1, 2, 3, 4, 13}) {
            const Blocks w(format, size, rows, cols, 100, 20), x("nvfp4", 16, tokens, cols, 100, 20);
            const Matrix<float> values = random_matrix(tokens, cols);
            Matrix<float> expected(tokens, rows), of_bytes(tokens, rows);
            matmul_packed(x.view(), w.view(), expected.view(), 1);
            matmul_int8(values.view(), w.view(), of_bytes.view(), 1);
            for (const Layout layout : layouts)
                for (const int threads : thread_counts) {
                    const Matrix<float> in(values, layout, nan);
                    const Matrix<std::uint8_t> codes(w.codes, layout, 0x77), scales(w.scales, layout, 0x77), in_codes(x.codes, layout, 0x77), in_scales(x.scales, layout, 0x77);
                    const PackedMatrix by_rows{format, codes.view(), scales.view(), w.tensor_scale};
                    const Tiled tiled(by_rows, layout);
                    for (const Weight& weight : {Weight(by_rows), Weight(tiled.view())}) {
                        Matrix<float> out(tokens, rows, layout, nan);
                        matmul_packed({x.format, in_codes.view(), in_scales.view(), x.tensor_scale}, weight, out.view(), threads);
                        EXPECT_EQ(out, expected);
                        EXPECT_TRUE(out.padding_untouched());
                        matmul_int8(in.view(), weight, out.view(), threads);
                        EXPECT_EQ(out, of_bytes);
                        EXPECT_TRUE(out.padding_untouched());
                    }
                }
        }
}

// NVFP4 alone has rows of 16 columns, or of an odd number of groups.
TEST(IntegerProducts, OfHalfWords) {
    for (const Index cols : {16, 48, 112, 1040})
        for (const Index tokens : {1, 3, 4, 5}) {
            const Blocks w("nvfp4", 16, 70, cols, 40, 60), x("nvfp4", 16, tokens, cols, 40, 60, 0.7f);
            const Matrix<float> values = random_matrix(tokens, cols);
            in_both_forms(w.view(), [&](const Weight& weight) {
                Matrix<float> out(tokens, 70, layouts[0], nan);
                matmul_packed(x.view(), weight, out.view(), 1);
                EXPECT_EQ(out, product(operand_of(x), operand_of(w), 0.25 / (0.7f * 3.0)));
                matmul_int8(values.view(), weight, out.view(), 1);
                EXPECT_EQ(out, product(operand_of(values, 16), operand_of(w), 0.5 / 3));
            });
        }
}

TEST(IntegerProducts, OfNothing) {
    const Blocks w("nvfp4", 16, 5, 32, 100, 20), none("mxfp4", 32, 0, 32, 100, 20);
    Matrix<float> out(0, 5);
    matmul_packed(none.view(), w.view(), out.view(), 2);
    matmul_int8(Matrix<float>(0, 32).view(), w.view(), out.view(), 2);
}

TEST(IntegerProducts, Refuse) {
    const Blocks w("nvfp4", 16, 5, 32, 100, 20), x("mxfp4", 32, 2, 32, 100, 20), wide("nvfp4", 16, 2, 48, 100, 20);
    Matrix<float> out(2, 5), narrow(2, 4);
    PackedMatrix wrong = w.view(), unknown = w.view();
    wrong.format = "mxfp4";
    unknown.format = "fp8";
    expect_refused("x has 48 columns; the weight has 32", [&] { matmul_packed(wide.view(), w.view(), out.view(), 1); });
    expect_refused("x has 48 columns; the weight has 32", [&] { matmul_int8(Matrix<float>(2, 48).view(), w.view(), out.view(), 1); });
    expect_refused("out has shape (2, 4); the product has (2, 5)", [&] { matmul_packed(x.view(), w.view(), narrow.view(), 1); });
    expect_refused("scales do not have one entry for each group of the weight", [&] { matmul_packed(x.view(), wrong, out.view(), 1); });
    expect_refused("scales do not have one entry for each group of the weight", [&] { matmul_int8(Matrix<float>(2, 32).view(), wrong, out.view(), 1); });
    expect_refused("unknown format \"fp8\"", [&] { matmul_int8(Matrix<float>(2, 32).view(), unknown, out.view(), 1); });
}

}  // namespace
}  // namespace mrgptq
