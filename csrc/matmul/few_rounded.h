// Products of rounded inputs with so few tokens that reading the weight is most of the work: codes are lifted where they are multiplied, and nothing decoded is stored.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/parallel.h"
#include "formats/block_format.h"
#include "matmul/row_scales.h"
#include "matmul/tile_reader.h"
#include "matmul/tokens.h"
#include "simd/dot.h"

namespace mrgptq {

using FewRoundedRows = TileReader<few_rows / tile_rows, depth_at_once>;

// Adds the products of some columns of these rows with a tile's tokens to `sums`, few_rows a token.
template <class Format, Index group, bool exact, Index tokens>
void add_few(const FewRoundedRows& weight, const RowScales<Format, few_rows>& scale_of, Index depth, const std::uint32_t* from, float* sums) noexcept {
    using namespace simd;
    constexpr Index w = simd::lanes, vectors = w == 16 ? 4 : 2, words_a_group = group / codes_a_word, groups_a_scale = Format::group_size / group;
    for (Index row = 0; row < few_rows; row += vectors * w) {
        Floats sum[tokens][vectors];
        for (Index t = 0; t < tokens; ++t)
            for (Index v = 0; v < vectors; ++v) sum[t][v] = simd::load(sums + t * few_rows + row + v * w);
        const std::uint32_t* token = from;
        for (Index g = 0; g < depth / group; ++g, token += tokens * PackedTokens<group>::words_a_group) {
            const std::uint32_t *const scales = token + tokens, *const bytes = scales + tokens;
            for (Index v = 0; v < vectors; ++v) {
                Words dot[tokens];
                for (Index t = 0; t < tokens; ++t) dot[t] = splat(token[t]);
#pragma GCC unroll 4
                for (Index i = 0; i < words_a_group; ++i) {
                    const Words codes = weight.codes(g * words_a_group + i, row + v * w), low = lifted(codes & low_nibbles), high = lifted(codes >> 4 & low_nibbles);
                    for (Index t = 0; t < tokens; ++t) dot[t] = add_products(dot[t], low, splat(bytes[2 * i * tokens + t]));
                    for (Index t = 0; t < tokens; ++t) dot[t] = add_products(dot[t], high, splat(bytes[(2 * i + 1) * tokens + t]));
                }
                const Floats step = scale_of.of(weight.scales(g / groups_a_scale, row + v * w), row + v * w);
                for (Index t = 0; t < tokens; ++t) {
                    const Floats scale = step * floats(splat(scales[t])), whole = finished_sums(dot[t]);
                    sum[t][v] = exact ? add_exact_product(whole, scale, sum[t][v]) : sum[t][v] + whole * scale;
                }
            }
        }
        for (Index t = 0; t < tokens; ++t)
            for (Index v = 0; v < vectors; ++v) simd::store(sums + t * few_rows + row + v * w, sum[t][v]);
    }
}

// For no more tokens than a tile has.
template <class Format, bool exact, Index group, Index tokens = tile_tokens>
void multiply_few(const PackedTokens<group>& x, const Weight& weight, MatrixView<float> out, int threads) {
    if constexpr (tokens > 1)
        if (x.tokens < tokens) return multiply_few<Format, exact, group, tokens - 1>(x, weight, out, threads);
    parallel_for_ranges(weight.rows, few_rows, threads, [&](Index row, Index end) {
        const RowScales<Format, few_rows> scale_of(weight, row);
        FewRoundedRows rows(weight, Format::group_size, row);
        alignas(cache_line) float sums[tokens * few_rows] = {};
        for (Index k = 0; k < x.cols; k += depth_at_once) {
            const Index depth = std::min(depth_at_once, x.cols - k);
            rows.to(k, depth);
            add_few<Format, group, exact, tokens>(rows, scale_of, depth, x.tile(k, 0, depth), sums);
        }
        for (Index t = 0; t < tokens; ++t)
            for (Index r = 0; r < end - row; ++r)
                out.row(t)[row + r] = static_cast<float>(sums[t * few_rows + r] * (x.factors[static_cast<std::size_t>(t)] * scale_of.factor(r)));
    });
}

}  // namespace mrgptq
