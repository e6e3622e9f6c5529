#include "matmul/matmul.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/buffer.h"
#include "base/parallel.h"
#include "codecs/scale_rule.h"
#include "formats/block_format.h"
#include "linalg/lanes.h"
#include "linalg/squares.h"
#include "matmul/few_tokens.h"
#include "matmul/shapes.h"
#include "simd/e2m1.h"

namespace mrgptq {
namespace {

constexpr Index ahead = 512;  // bytes of a row: what is sent for; memory foresees few of 32 rows that are read side by side
constexpr Index most_tokens = 512;  // packed at once: what the weights, decoded anew for so many, take beside the products is lost in them

// Packed weights, and the step that each stored scale stands for.
struct Weights {
    MatrixView<const std::uint8_t> codes, scales;
    std::array<float, 256> steps;
};

// Values of `depth` columns from k on of 32 rows, in lanes: `to` (depth, 32). Rows behind the last are zero. Eight codes of a row are a word; as many words of as many rows as a vector has lanes
// are turned in registers, so that each vector holds eight columns of its rows.
template <class Format>
void decode_lanes(const Weights& weights, Index row, Index k, Index depth, float* to) noexcept {
    constexpr Index w = simd::lanes, size = Format::group_size, codes_a_word = 8;
    for (Index first = 0; first < lanes; first += w) {
        const Index rows = std::clamp<Index>(weights.codes.rows - row - first, 0, w);
        alignas(cache_line) float steps[product_depth / size][w] = {};
        for (Index r = 0; r < rows; ++r) {
            const std::uint8_t* scales = weights.scales.row(row + first + r) + k / size;
            for (Index g = 0; g < depth / size; ++g) steps[g][r] = weights.steps[scales[g]];
        }
        for (Index r = 0; r < rows; ++r) __builtin_prefetch(weights.codes.row(row + first + r) + k / 2 + ahead);
        for (Index word = 0; word < depth / codes_a_word; word += w) {
            const Index words = std::min(w, depth / codes_a_word - word);
            const auto codes = [&](Index r) { return weights.codes.row(row + first + r) + (k + word * codes_a_word) / 2; };
            std::array<simd::Words, w> square;
            if (rows == w && words == w) {
                for (Index r = 0; r < w; ++r) std::memcpy(&square[static_cast<std::size_t>(r)], codes(r), sizeof(simd::Words));
            } else {
                square.fill(simd::Words{});
                for (Index r = 0; r < rows; ++r) std::memcpy(&square[static_cast<std::size_t>(r)], codes(r), static_cast<std::size_t>(words) * sizeof(std::uint32_t));
            }
            square = turned(square);
            for (Index i = 0; i < words; ++i)
                for (Index c = 0; c < codes_a_word; ++c) {
                    const Index column = (word + i) * codes_a_word + c;
                    const simd::Floats values = simd::decode_e2m1(square[static_cast<std::size_t>(i)] >> static_cast<std::uint32_t>(4 * c));
                    simd::store(to + column * lanes + first, simd::load(steps[column / size]) * values);
                }
        }
    }
}

// Adds the products of 32 rows with a strip's first `tokens` to `sums`, 32 a token: as narrow a tile as holds them, an element's chain being the same in all.
template <Index cols = kernel_cols>
void add_strip(const float* values, const float* strip, Index depth, Index tokens, float* sums) noexcept {
    if constexpr (cols > 1)
        if (2 * tokens <= cols) return add_strip<cols / 2>(values, strip, depth, tokens, sums);
    for (Index r = 0; r < lanes; r += kernel_rows<float>) {
        const auto column_at = [=](Index j) { return sums + j * lanes + r; };
        multiply_tile<float, false, cols>(depth, values + r, lanes, strip, kernel_cols, column_at, [](Index) {});
    }
}

template <class Format>
void multiply(const Weights& weights, MatrixView<const float> x, MatrixView<float> out, int threads) {
    const Index strips = strip_count(x.rows);
    const Buffer<float> packed(x.cols * strips * kernel_cols);
    parallel_for_ranges(x.cols, product_depth, threads, [&](Index k, Index end) { pack_strips(x.data + k, Index{1}, x.row_stride, end - k, x.rows, packed.data() + k * strips * kernel_cols); });
    parallel_for_ranges(weights.codes.rows, lanes, threads, [&](Index row, Index end) {
        // Sums of a token are adjacent here; in `out` tokens may lie a power of two apart, which would share one set of the caches.
        const Buffer<float> values(product_depth * lanes), sums(strips * kernel_cols * lanes);
        std::fill_n(sums.data(), strips * kernel_cols * lanes, 0.0f);
        for (Index k = 0; k < x.cols; k += product_depth) {
            const Index depth = std::min(product_depth, x.cols - k);
            decode_lanes<Format>(weights, row, k, depth, values.data());
            for (Index token = 0; token < x.rows; token += kernel_cols)
                add_strip(values.data(), packed.data() + k * strips * kernel_cols + token * depth, depth, std::min(kernel_cols, x.rows - token), sums.data() + token * lanes);
        }
        for (Index token = 0; token < x.rows; ++token) std::copy_n(sums.data() + token * lanes, end - row, out.row(token) + row);
    });
}

// For as many tokens as there are, up to few_tokens.
template <class Format, Index tokens = few_tokens>
void multiply_each(const PackedMatrix& weight, MatrixView<const float> x, MatrixView<float> out, int threads) {
    if constexpr (tokens > 1)
        if (x.rows < tokens) return multiply_each<Format, tokens - 1>(weight, x, out, threads);
    constexpr Index rows = few_rows<tokens>;
    parallel_for_ranges(weight.codes.rows, rows, threads, [&](Index row, Index end) {
        alignas(cache_line) float sums[tokens * rows];
        multiply_few<Format, tokens>(weight, row, x, sums);
        for (Index t = 0; t < tokens; ++t) std::copy_n(sums + t * rows, end - row, out.row(t) + row);
    });
}

}  // namespace

void matmul(MatrixView<const float> x, const PackedMatrix& weight, MatrixView<float> out, int threads) {
    check_shapes(x.rows, x.cols, weight, out);
    with_format(weight.format, [&]<class Format>(Format) {
        check_scales(weight, Format::group_size, "the weight");
        if (x.rows > 0 && x.rows <= few_tokens) return multiply_each<Format>(weight, x, out, threads);
        Weights weights{weight.codes, weight.scales, {}};
        for (std::size_t byte = 0; byte < weights.steps.size(); ++byte) weights.steps[byte] = group_step<Format>(static_cast<std::uint8_t>(byte), weight.tensor_scale);
        for (Index token = 0; token < x.rows; token += most_tokens) {
            const Index tokens = std::min(most_tokens, x.rows - token);
            multiply<Format>(weights, {x.row(token), tokens, x.cols, x.row_stride}, {out.row(token), tokens, out.cols, out.row_stride}, threads);
        }
    });
}

}  // namespace mrgptq
