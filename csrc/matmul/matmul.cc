#include "matmul/matmul.h"

#include <algorithm>
#include <array>
#include <vector>

#include "base/buffer.h"
#include "base/parallel.h"
#include "formats/block_format.h"
#include "linalg/lanes.h"
#include "matmul/few_tokens.h"
#include "matmul/half_steps.h"
#include "matmul/tile_reader.h"
#include "simd/e2m1.h"

namespace mrgptq {
namespace {

static_assert(lanes == tile_rows);

constexpr Index most_tokens = 512;  // packed at once: what the weights, decoded anew for so many, take beside the products is lost in them
constexpr Index many_tokens = 64;   // whose 128 columns are read from far away: several tiles of rows then take them before the next

using TileRows = TileReader<1, product_depth>;

// 128 columns of 32 rows in lanes: twice the values of their codes, and half the step of each group.
template <class Format>
struct Decoded {
    static constexpr Index size = Format::group_size;

    alignas(cache_line) float doubled[product_depth * lanes], half_steps[product_depth / size * lanes];

    void decode(const TileRows& weight, const HalfSteps<Format>& step_of, Index depth) noexcept {
        for (Index first = 0; first < lanes; first += simd::lanes) {
            for (Index g = 0; g < depth / size; g += scales_a_word) step_of.of_four(weight.four_scales(g / scales_a_word, first), half_steps + g * lanes + first, lanes);
            for (Index column = 0; column < depth; column += codes_a_word) {
                const simd::Words codes = weight.codes(column / codes_a_word, first);
                for (Index j = 0; j < codes_a_word; ++j) simd::store(doubled + (column + j) * lanes + first, simd::decode_e2m1<2>(codes >> static_cast<std::uint32_t>(4 * j)));
            }
        }
    }
};

// Adds the products of 32 rows with a strip's first `tokens` to `sums`, 32 a token: as narrow a tile as holds them, an element's sums being the same in all.
template <Index cols = kernel_cols, class Format>
void add_strip(const Decoded<Format>& weight, const float* strip, Index depth, Index tokens, float* sums) noexcept {
    if constexpr (cols > 1)
        if (2 * tokens <= cols) return add_strip<cols / 2>(weight, strip, depth, tokens, sums);
    constexpr Index w = vector_size<float>, size = Format::group_size;
    for (Index r = 0; r < lanes; r += kernel_rows<float>) {
        for (Index j = 0; j < cols; ++j) __builtin_prefetch(sums + j * lanes + r, 1);
        std::array<Vector<float>, cols> low{}, high{};
        for (Index c = 0; c < depth; c += size) {
            const float* const steps = weight.half_steps + c / size * lanes + r;
            const Vector<float> low_steps = load(steps), high_steps = load(steps + w);
            sum_tile<float, cols>(size, weight.doubled + c * lanes + r, lanes, strip + c * kernel_cols, kernel_cols, [](Index) {}, [&](Index j, Vector<float> a, Vector<float> b) {
                low[static_cast<std::size_t>(j)] = fused(a, low_steps, low[static_cast<std::size_t>(j)]);
                high[static_cast<std::size_t>(j)] = fused(b, high_steps, high[static_cast<std::size_t>(j)]);
            });
        }
        for (std::size_t j = 0; j < cols; ++j) {
            float* const to = sums + static_cast<Index>(j) * lanes + r;
            store<float>(to, load(to) + low[j]);
            store<float>(to + w, load(to + w) + high[j]);
        }
    }
}

template <class Format>
void multiply(const Weight& weight, const HalfSteps<Format>& step_of, MatrixView<const float> x, MatrixView<float> out, int threads) {
    if (x.rows > 0 && x.rows <= few_tokens) return multiply_few(weight, step_of, x, out, threads);
    const Index width = strip_count(x.rows) * kernel_cols;
    const Buffer<float> packed(x.cols * width);
    parallel_for_ranges(x.cols, product_depth, threads, [&](Index k, Index end) { pack_strips(x.data + k, Index{1}, x.row_stride, end - k, x.rows, packed.data() + k * width); });
    parallel_for_ranges(weight.rows, rows_of_piece(weight.rows, threads), threads, [&](Index begin, Index end) {
        const Index together = x.rows > many_tokens ? tiles_together : 1;
        // Sums of a token are adjacent here; in `out` tokens may lie a power of two apart, which would share one set of the caches.
        const Buffer<float> sums(together * width * lanes);
        Decoded<Format> decoded;
        for (Index row = begin; row < end; row += together * lanes) {
            std::vector<TileRows> tiles;
            tiles.reserve(static_cast<std::size_t>(together));
            for (Index first = row; first < std::min(end, row + together * lanes); first += lanes) tiles.emplace_back(weight, Format::group_size, first);
            std::fill_n(sums.data(), together * width * lanes, 0.0f);
            for (Index k = 0; k < x.cols; k += product_depth) {
                const Index depth = std::min(product_depth, x.cols - k);
                float* to = sums.data();
                for (TileRows& tile : tiles) {
                    tile.to(k, depth);
                    decoded.decode(tile, step_of, depth);
                    for (Index token = 0; token < x.rows; token += kernel_cols) add_strip(decoded, packed.data() + k * width + token * depth, depth, std::min(kernel_cols, x.rows - token), to + token * lanes);
                    to += width * lanes;
                }
            }
            for (Index first = row, tile = 0; first < std::min(end, row + together * lanes); first += lanes, ++tile)
                for (Index token = 0; token < x.rows; ++token) std::copy_n(sums.data() + (tile * width + token) * lanes, std::min(lanes, end - first), out.row(token) + first);
        }
    });
}

}  // namespace

void matmul(MatrixView<const float> x, const Weight& weight, MatrixView<float> out, int threads) {
    check_shapes(x.rows, x.cols, weight, out);
    with_format(weight.format, [&]<class Format>(Format) {
        check_weight(weight, Format::group_size);
        const HalfSteps<Format> step_of(weight.tensor_scale);
        for (Index token = 0; token < x.rows; token += most_tokens) {
            const Index tokens = std::min(most_tokens, x.rows - token);
            multiply(weight, step_of, {x.row(token), tokens, x.cols, x.row_stride}, {out.row(token), tokens, out.cols, out.row_stride}, threads);
        }
    });
}

}  // namespace mrgptq
