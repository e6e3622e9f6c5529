// Products of one to four float tokens, whose time is the reading of the weight: values are multiplied as they are decoded, and none is stored.
//
// The same sums in the same order as matmul.cc's for more tokens, to the byte.
#pragma once

#include <algorithm>

#include "linalg/lanes.h"
#include "matmul/half_steps.h"
#include "matmul/tile_reader.h"
#include "simd/e2m1.h"

namespace mrgptq {

inline constexpr Index few_tokens = 4;  // with more the decoded weights are worth storing

using FewRows = TileReader<few_rows / tile_rows, product_depth>;

// linalg's operation in this room's vectors.
MRGPTQ_INLINE simd::Floats fused_sum(simd::Floats a, simd::Floats b, simd::Floats c) noexcept { return (simd::Floats)mrgptq::fused((Vector<float>)a, (Vector<float>)b, (Vector<float>)c); }
MRGPTQ_INLINE simd::Floats fused_sum(simd::Floats a, float b, simd::Floats c) noexcept { return fused_sum(a, simd::splat(b), c); }

// Adds the products of some columns of few_rows rows with tokens' inputs, x's from column k on, to `sums`, few_rows a token.
template <Index tokens, class Format>
void add_few(const FewRows& weight, const HalfSteps<Format>& step_of, Index depth, MatrixView<const float> x, Index k, float* sums) noexcept {
    using namespace simd;
    // Chains wait for themselves, so there are several; fewer where registers are.
    constexpr Index w = simd::lanes, vectors = (w == 16 ? tokens < few_tokens : tokens == 1) ? 4 : 2, size = Format::group_size, half_word = codes_a_word / 2;
    for (Index row = 0; row < few_rows; row += vectors * w) {
        alignas(cache_line) float half_steps[product_depth / size][vectors * w];
        for (Index g = 0; g < depth / size; g += scales_a_word)
            for (Index v = 0; v < vectors; ++v) step_of.of_four(weight.four_scales(g / scales_a_word, row + v * w), half_steps[g] + v * w, vectors * w);
        Floats sum[tokens][vectors] = {};
        for (Index c = 0; c < depth; c += size) {
            Floats chain[tokens][vectors] = {};
            for (Index word = c / codes_a_word; word < (c + size) / codes_a_word; ++word) {
                const float* const from = x.data + k + word * codes_a_word;
                const auto add = [&](Index column, Index v, Floats value) {
                    for (Index t = 0; t < tokens; ++t) chain[t][v] = fused_sum(value, from[t * x.row_stride + column], chain[t][v]);
                };
                Floats upper[half_word][vectors];
#pragma GCC unroll 4
                for (Index j = 0; j < half_word; ++j)
                    for (Index v = 0; v < vectors; ++v) {
                        const Words codes = weight.codes(word, row + v * w) >> static_cast<std::uint32_t>(4 * j);
                        add(j, v, decode_e2m1<2>(codes));
                        upper[j][v] = decode_upper_doubled(codes);
                    }
#pragma GCC unroll 4
                for (Index j = 0; j < half_word; ++j)
                    for (Index v = 0; v < vectors; ++v) add(half_word + j, v, upper[j][v]);
            }
            for (Index v = 0; v < vectors; ++v) {
                const Floats half_step = simd::load(half_steps[c / size] + v * w);
                for (Index t = 0; t < tokens; ++t) sum[t][v] = fused_sum(chain[t][v], half_step, sum[t][v]);
            }
        }
        for (Index t = 0; t < tokens; ++t)
            for (Index v = 0; v < vectors; ++v) {
                float* const to = sums + t * few_rows + row + v * w;
                simd::store(to, simd::load(to) + sum[t][v]);
            }
    }
}

// For as many tokens as there are, up to few_tokens.
template <class Format, Index tokens = few_tokens>
void multiply_few(const Weight& weight, const HalfSteps<Format>& step_of, MatrixView<const float> x, MatrixView<float> out, int threads) {
    if constexpr (tokens > 1)
        if (x.rows < tokens) return multiply_few<Format, tokens - 1>(weight, step_of, x, out, threads);
    parallel_for_ranges(weight.rows, few_rows, threads, [&](Index row, Index end) {
        FewRows rows(weight, Format::group_size, row);
        alignas(cache_line) float sums[tokens * few_rows] = {};
        for (Index k = 0; k < x.cols; k += product_depth) {
            const Index depth = std::min(product_depth, x.cols - k);
            rows.to(k, depth);
            add_few<tokens>(rows, step_of, depth, x, k, sums);
        }
        for (Index t = 0; t < tokens; ++t) std::copy_n(sums + t * few_rows, end - row, out.row(t) + row);
    });
}

}  // namespace mrgptq
