#include "matmul/integer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "base/buffer.h"
#include "base/parallel.h"
#include "formats/block_format.h"
#include "matmul/relative_scales.h"
#include "matmul/shapes.h"
#include "matmul/tokens.h"
#include "matmul/words.h"
#include "simd/dot.h"
#include "simd/e4m3.h"

namespace mrgptq {
namespace {

constexpr Index tile_rows = 32;
constexpr Index codes_ahead = 512;   // bytes of a row: what is sent for
constexpr Index many_tokens = 64;    // whose chunks of columns are read from far away: several tiles of rows then take one before the next
constexpr Index tiles_together = 4;

// Some columns of 32 rows in lanes: of each four columns a word of lifted codes, of each group a scale.
template <class Format>
struct Decoded {
    alignas(cache_line) std::uint32_t lifted[depth_at_once / 4 * tile_rows];
    alignas(cache_line) float scales[depth_at_once / Format::group_size * tile_rows];
};

// 32 rows of packed weights.
template <class Format>
class WeightTile {
public:
    std::array<double, tile_rows> factors;  // what the sums are to be multiplied by beside the tokens' own

    WeightTile(const PackedMatrix& weight, Index row) : weight_(weight), row_(row), scale_words_((weight.scales.cols + 4 * simd::lanes - 1) / (4 * simd::lanes) * simd::lanes * tile_rows) {
        alignas(cache_line) std::uint32_t largest[tile_rows] = {};  // of each of a word's bytes
        turn_words<tile_rows>(weight.scales, row, 0, weight.scales.cols, weight.scales.cols, [&](Index word, Index first, simd::Words bytes) {
            simd::store(scale_words_.data() + word * tile_rows + first, bytes);
            if constexpr (relative) simd::store(largest + first, larger_bytes(simd::load(largest + first), bytes));
        });
        for (std::size_t r = 0; r < tile_rows; ++r) {
            const auto bytes = std::bit_cast<std::array<std::uint8_t, 4>>(largest[r]);
            largest_[r] = *std::max_element(bytes.begin(), bytes.end());
            factors[r] = relative ? power_of_row(static_cast<int>(largest_[r]) - e8m0::bias) : 1.0;
        }
    }

    void decode(Index k, Index depth, Decoded<Format>& to) const noexcept {
        turn_words<tile_rows>(weight_.codes, row_, k / 2, depth / 2, codes_ahead, [&](Index word, Index first, simd::Words codes) {
            std::uint32_t* const lifted = to.lifted + 2 * word * tile_rows + first;
            simd::store(lifted, simd::lifted(codes & low_nibbles));
            simd::store(lifted + tile_rows, simd::lifted(codes >> 4 & low_nibbles));
        });
        for (Index g = 0; g < depth / Format::group_size; ++g) {
            const Index group = k / Format::group_size + g;
            for (Index first = 0; first < tile_rows; first += simd::lanes) {
                const simd::Words bytes = simd::load(scale_words_.data() + group / 4 * tile_rows + first) >> static_cast<std::uint32_t>(8 * (group % 4)) & 0xFFu;
                if constexpr (relative)
                    simd::store(to.scales + g * tile_rows + first, relative_scales(bytes, simd::load(largest_.data() + first)));
                else
                    simd::store(to.scales + g * tile_rows + first, simd::decode_e4m3(bytes));
            }
        }
    }

private:
    static constexpr bool relative = std::is_same_v<Format, Mxfp4>;

    static simd::Words larger_bytes(simd::Words a, simd::Words b) noexcept { return (simd::Words)((simd::Bytes)a > (simd::Bytes)b ? (simd::Bytes)a : (simd::Bytes)b); }

    const PackedMatrix& weight_;
    Index row_;
    Buffer<std::uint32_t> scale_words_;
    std::array<std::uint32_t, tile_rows> largest_;
};

// Adds the products of 32 rows with a tile's tokens to `sums`, 32 a token.
template <class Format, Index group, bool exact, Index tokens>
void add_tile(const Decoded<Format>& weights, const std::uint32_t* from, Index groups, float* sums) noexcept {
    using namespace simd;
    constexpr Index vectors = 2, w = simd::lanes, groups_a_scale = Format::group_size / group;
    for (Index r = 0; r < tile_rows; r += vectors * w) {
        const std::uint32_t *codes = weights.lifted + r, *token = from;
        Floats sum[tokens][vectors];
        for (Index t = 0; t < tokens; ++t)
            for (Index v = 0; v < vectors; ++v) sum[t][v] = load(sums + t * tile_rows + r + v * w);
        for (Index g = 0; g < groups; ++g) {
            Words dot[tokens][vectors];
            for (Index t = 0; t < tokens; ++t)
                for (Index v = 0; v < vectors; ++v) dot[t][v] = splat(token[t]);
            const std::uint32_t* const scales = token + tokens;
            token += 2 * tokens;
            for (Index i = 0; i < group / 4; ++i, codes += tile_rows, token += tokens) {
                const Words lifted[vectors] = {load(codes), load(codes + w)};
                for (Index t = 0; t < tokens; ++t)
                    for (Index v = 0; v < vectors; ++v) dot[t][v] = add_products(dot[t][v], lifted[v], splat(token[t]));
            }
            const float* const steps = weights.scales + g / groups_a_scale * tile_rows + r;
            for (Index t = 0; t < tokens; ++t)
                for (Index v = 0; v < vectors; ++v) {
                    const Floats scale = load(steps + v * w) * floats(splat(scales[t])), whole = finished_sums(dot[t][v]);
                    sum[t][v] = exact ? add_exact_product(whole, scale, sum[t][v]) : sum[t][v] + whole * scale;
                }
        }
        for (Index t = 0; t < tokens; ++t)
            for (Index v = 0; v < vectors; ++v) store(sums + t * tile_rows + r + v * w, sum[t][v]);
    }
}

// The same for as many tokens as there are, up to a tile's.
template <class Format, Index group, bool exact, Index tokens = tile_tokens>
void add_tokens(const Decoded<Format>& weights, const std::uint32_t* from, Index groups, Index count, float* sums) noexcept {
    if constexpr (tokens > 1)
        if (count < tokens) return add_tokens<Format, group, exact, tokens - 1>(weights, from, groups, count, sums);
    add_tile<Format, group, exact, tokens>(weights, from, groups, sums);
}

// Rows that a thread takes at a time: fewer where there would be too few pieces to share; no byte depends on it.
Index rows_of_piece(Index rows, int threads) noexcept {
    const Index team = threads > 0 ? threads : default_threads();
    return tile_rows * std::clamp<Index>(rows / (4 * tile_rows * team), 1, tiles_together);
}

template <class Format, bool exact, Index group>
void multiply(const PackedTokens<group>& x, const PackedMatrix& weight, MatrixView<float> out, int threads) {
    parallel_for_ranges(weight.codes.rows, rows_of_piece(weight.codes.rows, threads), threads, [&](Index begin, Index end) {
        const Index together = x.tokens > many_tokens ? tiles_together : 1;
        // Sums of a token are adjacent here; in `out` tokens may lie a power of two apart, which would share one set of the caches.
        const Buffer<float> sums(x.tokens * tile_rows * together);
        Decoded<Format> decoded;
        for (Index row = begin; row < end; row += together * tile_rows) {
            std::vector<WeightTile<Format>> tiles;
            tiles.reserve(static_cast<std::size_t>(together));
            for (Index first = row; first < std::min(end, row + together * tile_rows); first += tile_rows) tiles.emplace_back(weight, first);
            std::fill_n(sums.data(), x.tokens * tile_rows * together, 0.0f);
            for (Index k = 0; k < x.cols; k += depth_at_once) {
                const Index depth = std::min(depth_at_once, x.cols - k);
                float* to = sums.data();
                for (const WeightTile<Format>& tile : tiles) {
                    tile.decode(k, depth, decoded);
                    for (Index token = 0; token < x.tokens; token += tile_tokens)
                        add_tokens<Format, group, exact>(decoded, x.tile(k, token, depth), depth / group, std::min(tile_tokens, x.tokens - token), to + token * tile_rows);
                    to += x.tokens * tile_rows;
                }
            }
            const float* sum = sums.data();
            for (Index first = row; const WeightTile<Format>& tile : tiles) {
                for (Index token = 0; token < x.tokens; ++token, sum += tile_rows)
                    for (Index r = 0; r < std::min(tile_rows, end - first); ++r)
                        out.row(token)[first + r] = static_cast<float>(sum[r] * (x.factors[static_cast<std::size_t>(token)] * tile.factors[static_cast<std::size_t>(r)]));
                first += tile_rows;
            }
        }
    });
}

// Calls f(first, count) for every most_tokens tokens.
template <class F>
void for_most_tokens(Index tokens, F&& f) {
    for (Index first = 0; first < tokens; first += most_tokens) f(first, std::min(most_tokens, tokens - first));
}

template <class T>
MatrixView<T> rows_of(MatrixView<T> matrix, Index first, Index count) noexcept {
    return {matrix.row(first), count, matrix.cols, matrix.row_stride};
}

}  // namespace

void matmul_packed(const PackedMatrix& x, const PackedMatrix& weight, MatrixView<float> out, int threads) {
    check_shapes(x.codes.rows, x.codes.cols * 2, weight, out);
    with_format(x.format, [&]<class Inputs>(Inputs) {
        with_format(weight.format, [&]<class Format>(Format) {
            check_scales(x, Inputs::group_size, "x");
            check_scales(weight, Format::group_size, "the weight");
            for_most_tokens(x.codes.rows, [&](Index first, Index count) {
                const PackedInputs<Inputs> source(rows_of(x.codes, first, count), rows_of(x.scales, first, count));
                const PackedTokens<std::min(Inputs::group_size, Format::group_size)> packed(source, count, x.codes.cols * 2, 0.25 / (static_cast<double>(x.tensor_scale) * weight.tensor_scale), threads);
                multiply<Format, true>(packed, weight, rows_of(out, first, count), threads);
            });
        });
    });
}

void matmul_int8(MatrixView<const float> x, const PackedMatrix& weight, MatrixView<float> out, int threads) {
    check_shapes(x.rows, x.cols, weight, out);
    with_format(weight.format, [&]<class Format>(Format) {
        check_scales(weight, Format::group_size, "the weight");
        for_most_tokens(x.rows, [&](Index first, Index count) {
            const RoundedInputs<Format> source(rows_of(x, first, count), threads);
            multiply<Format, false>(PackedTokens<Format::group_size>(source, count, x.cols, 0.5 / weight.tensor_scale, threads), weight, rows_of(out, first, count), threads);
        });
    });
}

}  // namespace mrgptq
