// Products of one to four tokens, whose time is the reading of the weight: it is decoded and multiplied in registers.
//
// The same chains as matmul.cc's tiles, to the byte: 128 columns from zero on, each chain added to the sum of those before it.
#pragma once

#include "codecs/group_scales.h"
#include "linalg/lanes.h"
#include "matmul/words.h"
#include "simd/e2m1.h"

namespace mrgptq {

inline constexpr Index few_tokens = 4;  // with more the decoded weights are worth storing

// Rows side by side: where one token leaves registers for it twice as many chains, which wait for themselves.
template <Index tokens>
inline constexpr Index few_rows = simd::lanes * (vector_bytes == 64 || tokens == 1 ? 4 : 2);

// A vector of words from byte `offset` of word `first` on.
MRGPTQ_INLINE simd::Words words_from(const std::uint32_t* words, Index first, Index offset) noexcept {
    simd::Words v;
    std::memcpy(&v, reinterpret_cast<const std::uint8_t*>(words + first) + offset, sizeof v);
    return v;
}

// Sums of the rows [row, row + few_rows) for each token, `few_rows` of them a token; rows behind the last are zero. x (tokens, cols).
template <class Format, Index tokens>
void multiply_few(const PackedMatrix& weight, Index row, MatrixView<const float> x, float* sums) noexcept {
    using namespace simd;
    constexpr Index rows = few_rows<tokens>, vectors = rows / simd::lanes, size = Format::group_size, codes_a_word = 8;
    constexpr Index codes_ahead = 512, scales_ahead = 128;  // bytes of a row
    constexpr Index scales_at_once = 64, scale_cols = scales_at_once * size;  // a cache line of each row
    // Words of codes as they are and shifted by one code, whatever lies behind the last: at a word's byte b stand its codes 2 b and 2 b + 1, so that most shifts are left to the loads.
    constexpr Index words = product_depth / codes_a_word * rows;
    alignas(cache_line) std::uint32_t even[words + 1], odd[words + 1];
    alignas(cache_line) std::uint32_t scales[scales_at_once / 4 * rows];
    Floats sum[tokens][vectors] = {};
    for (Index k = 0; k < x.cols; k += product_depth) {
        const Index depth = std::min(product_depth, x.cols - k);
        if (k % scale_cols == 0)
            turn_words<rows>(weight.scales, row, k / size, std::min(scales_at_once, weight.scales.cols - k / size), scales_ahead, [&](Index word, Index first, Words four) { store(scales + word * rows + first, four); });
        turn_words<rows>(weight.codes, row, k / 2, depth / 2, codes_ahead, [&](Index word, Index first, Words eight) {
            store(even + word * rows + first, eight);
            store(odd + word * rows + first, eight >> 4u);
        });
        Floats chain[tokens][vectors] = {};
        for (Index c = 0; c < depth; c += size) {
            const Index group = (k + c) % scale_cols / size;
            Floats steps[vectors];
            for (Index v = 0; v < vectors; ++v)
                steps[v] = group_steps<Format>(load(scales + group / 4 * rows + v * simd::lanes) >> static_cast<std::uint32_t>(8 * (group % 4)) & 0xFFu, weight.tensor_scale);
            for (Index word = c / codes_a_word; word < (c + size) / codes_a_word; ++word) {
                const float* from = x.data + k + word * codes_a_word;
#pragma GCC unroll 8
                for (Index j = 0; j < codes_a_word; ++j)
                    for (Index v = 0; v < vectors; ++v) {
                        const Floats value = steps[v] * decode_e2m1(words_from(j % 2 ? odd : even, word * rows + v * simd::lanes, j / 2));
                        for (Index t = 0; t < tokens; ++t) chain[t][v] = (Floats)mrgptq::fused((Vector<float>)value, mrgptq::splat(from[t * x.row_stride + j]), (Vector<float>)chain[t][v]);
                    }
            }
        }
        for (Index t = 0; t < tokens; ++t)
            for (Index v = 0; v < vectors; ++v) sum[t][v] += chain[t][v];
    }
    for (Index t = 0; t < tokens; ++t)
        for (Index v = 0; v < vectors; ++v) store(sums + t * rows + v * simd::lanes, sum[t][v]);
}

}  // namespace mrgptq
