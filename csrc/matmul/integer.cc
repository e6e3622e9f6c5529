#include "matmul/integer.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/parallel.h"
#include "formats/block_format.h"
#include "matmul/few_rounded.h"
#include "matmul/row_scales.h"
#include "matmul/tile_reader.h"
#include "matmul/tokens.h"
#include "simd/dot.h"

namespace mrgptq {
namespace {

constexpr Index many_tokens = 64;  // whose chunks of columns are read from far away: several tiles of rows then take one before the next

// Some columns of 32 rows in lanes: of each four columns a word of lifted codes, of each group a scale.
template <class Format>
struct Decoded {
    alignas(cache_line) std::uint32_t lifted[depth_at_once / 4 * tile_rows];
    alignas(cache_line) float scales[depth_at_once / Format::group_size * tile_rows];
};

// 32 rows of a weight.
template <class Format>
class WeightTile {
public:
    std::array<double, tile_rows> factors;  // what the sums are to be multiplied by beside the tokens' own

    WeightTile(const Weight& weight, Index row) noexcept : scales_(weight, row), reader_(weight, Format::group_size, row) {
        for (Index r = 0; r < tile_rows; ++r) factors[static_cast<std::size_t>(r)] = scales_.factor(r);
    }

    void decode(Index k, Index depth, Decoded<Format>& to) noexcept {
        reader_.to(k, depth);
        for (Index first = 0; first < tile_rows; first += simd::lanes) {
            for (Index word = 0; word < depth / codes_a_word; ++word) {
                const simd::Words codes = reader_.codes(word, first);
                std::uint32_t* const lifted = to.lifted + 2 * word * tile_rows + first;
                simd::store(lifted, simd::lifted(codes & low_nibbles));
                simd::store(lifted + tile_rows, simd::lifted(codes >> 4 & low_nibbles));
            }
            for (Index g = 0; g < depth / Format::group_size; ++g) simd::store(to.scales + g * tile_rows + first, scales_.of(reader_.scales(g, first), first));
        }
    }

private:
    RowScales<Format, tile_rows> scales_;
    TileReader<1, depth_at_once> reader_;
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

template <class Format, bool exact, Index group>
void multiply(const PackedTokens<group>& x, const Weight& weight, MatrixView<float> out, int threads) {
    if (weight.tiled && x.tokens > 0 && x.tokens <= tile_tokens) return multiply_few<Format, exact>(x, weight, out, threads);
    parallel_for_ranges(weight.rows, rows_of_piece(weight.rows, threads), threads, [&](Index begin, Index end) {
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
                for (WeightTile<Format>& tile : tiles) {
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

void matmul_packed(const PackedMatrix& x, const Weight& weight, MatrixView<float> out, int threads) {
    check_shapes(x.codes.rows, x.codes.cols * 2, weight, out);
    with_format(x.format, [&]<class Inputs>(Inputs) {
        with_format(weight.format, [&]<class Format>(Format) {
            check_scales(x, Inputs::group_size, "x");
            check_weight(weight, Format::group_size);
            for_most_tokens(x.codes.rows, [&](Index first, Index count) {
                const PackedInputs<Inputs> source(rows_of(x.codes, first, count), rows_of(x.scales, first, count));
                const PackedTokens<std::min(Inputs::group_size, Format::group_size)> packed(source, count, x.codes.cols * 2, 0.25 / (static_cast<double>(x.tensor_scale) * weight.tensor_scale), threads);
                multiply<Format, true>(packed, weight, rows_of(out, first, count), threads);
            });
        });
    });
}

void matmul_int8(MatrixView<const float> x, const Weight& weight, MatrixView<float> out, int threads) {
    check_shapes(x.rows, x.cols, weight, out);
    with_format(weight.format, [&]<class Format>(Format) {
        check_weight(weight, Format::group_size);
        for_most_tokens(x.rows, [&](Index first, Index count) {
            const RoundedInputs<Format> source(rows_of(x, first, count), threads);
            multiply<Format, false>(PackedTokens<Format::group_size>(source, count, x.cols, 0.5 / weight.tensor_scale, threads), weight, rows_of(out, first, count), threads);
        });
    });
}

}  // namespace mrgptq
