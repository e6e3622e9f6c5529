#include "matmul/integer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <type_traits>

#include "base/buffer.h"
#include "base/check.h"
#include "base/finite.h"
#include "base/parallel.h"
#include "codecs/chunk.h"
#include "formats/block_format.h"
#include "matmul/words.h"
#include "simd/dot.h"
#include "simd/e4m3.h"

namespace mrgptq {
namespace {

constexpr Index tile_rows = 32;
constexpr Index tile_tokens = simd::lanes == 16 ? 4 : 2;  // by two vectors of rows: as many sums as leave registers for the rest
constexpr Index depth_at_once = 512;  // columns: of 32 rows they fill half of the first cache
constexpr Index most_tokens = 512;    // packed at once
constexpr Index ahead = 512;          // bytes of a row: what is sent for
constexpr Index least_power = 60;     // a scale below 2^-60 of its row's largest counts as zero
constexpr Index codes_a_word = 8;
constexpr std::uint32_t low_nibbles = 0x0F0F0F0Fu;

// MXFP4's scale relative to the largest of its row.
constexpr float relative_scale(std::uint8_t byte, std::uint8_t largest) noexcept {
    if (byte == 255) return std::numeric_limits<float>::quiet_NaN();
    return largest - byte > least_power ? 0.0f : std::bit_cast<float>(static_cast<std::uint32_t>(127 + byte - largest) << 23);
}

MRGPTQ_INLINE simd::Words relative_scales(simd::Words bytes, simd::Words largest) noexcept {
    using namespace simd;
    const Words below = largest - bytes;
    return select(bytes == 255u, splat(0x7FC00000u), select(below > static_cast<std::uint32_t>(least_power), Words{}, (127u - below) << 23));
}

// Words of four bytes of 32 rows: take(word, the first of its rows, a vector of as many rows' words as it has lanes). Behind the last row and behind `bytes` is zero.
template <class Take>
MRGPTQ_INLINE void turn_words(MatrixView<const std::uint8_t> from, Index row, Index byte, Index bytes, Take&& take) noexcept {
    constexpr Index w = simd::lanes, side = w * 4;
    for (Index begin = 0; begin < bytes; begin += side)
        for (Index first = 0; first < tile_rows; first += w) {
            const Index rows = std::clamp<Index>(from.rows - row - first, 0, w), here = std::min(side, bytes - begin);
            const std::uint8_t* corner = from.data + (row + first) * from.row_stride + byte + begin;
            Index stride = from.row_stride;
            alignas(cache_line) std::uint8_t part[w * side];
            if (rows < w || here < side) [[unlikely]] {
                std::fill(std::begin(part), std::end(part), std::uint8_t{0});
                for (Index r = 0; r < rows; ++r) std::copy_n(corner + r * stride, here, part + r * side);
                corner = part;
                stride = side;
            }
            const WordSquare square = load_turned(corner, stride, ahead);
            for (Index i = 0; i < w; ++i) take(begin / 4 + i, first, square[static_cast<std::size_t>(i)]);
        }
}

// 32 rows of packed weights in lanes: of each four columns a word of lifted codes, of each group a scale.
template <class Format>
class WeightTile {
public:
    std::array<double, tile_rows> factors;  // what the sums are to be multiplied by beside the tokens' own
    alignas(cache_line) std::uint32_t lifted[depth_at_once / 4 * tile_rows];
    alignas(cache_line) float scales[depth_at_once / Format::group_size * tile_rows];

    WeightTile(const PackedMatrix& weight, Index row) noexcept(false) : weight_(weight), row_(row), scale_words_((weight.scales.cols + 4 * simd::lanes - 1) / (4 * simd::lanes) * simd::lanes * tile_rows) {
        alignas(cache_line) std::uint32_t largest[tile_rows] = {};  // of each of a word's bytes
        turn_words(weight.scales, row, 0, weight.scales.cols, [&](Index word, Index first, simd::Words bytes) {
            simd::store(scale_words_.data() + word * tile_rows + first, bytes);
            if constexpr (relative) simd::store(largest + first, larger_bytes(simd::load(largest + first), bytes));
        });
        for (std::size_t r = 0; r < tile_rows; ++r) {
            const auto bytes = std::bit_cast<std::array<std::uint8_t, 4>>(largest[r]);
            largest_[r] = *std::max_element(bytes.begin(), bytes.end());
            factors[r] = relative ? std::ldexp(1.0, static_cast<int>(largest_[r]) - e8m0::bias) : 1.0;
        }
    }

    void decode(Index k, Index depth) noexcept {
        turn_words(weight_.codes, row_, k / 2, depth / 2, [&](Index word, Index first, simd::Words codes) {
            std::uint32_t* const to = lifted + 2 * word * tile_rows + first;
            simd::store(to, simd::lifted(codes & low_nibbles));
            simd::store(to + tile_rows, simd::lifted(codes >> 4 & low_nibbles));
        });
        for (Index g = 0; g < depth / Format::group_size; ++g) {
            const Index group = k / Format::group_size + g;
            for (Index first = 0; first < tile_rows; first += simd::lanes) {
                const simd::Words bytes = simd::load(scale_words_.data() + group / 4 * tile_rows + first) >> static_cast<std::uint32_t>(8 * (group % 4)) & 0xFFu;
                if constexpr (relative)
                    simd::store(reinterpret_cast<std::uint32_t*>(scales) + g * tile_rows + first, relative_scales(bytes, simd::load(largest_.data() + first)));
                else
                    simd::store(scales + g * tile_rows + first, simd::decode_e4m3(bytes));
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

// Tokens as the tile reads them, one word after the other: chunks of columns; in a chunk as many tokens as a tile has; of these, group after group, what each token's sums begin at, its scales, and its
// bytes, four columns a word, in the order that decoding gives the weight's.
template <Index group>
struct PackedTokens {
    static constexpr Index words_a_group = 2 + group / 4;

    Index tokens, cols;
    Buffer<std::uint32_t> words;
    std::array<double, most_tokens> factors;  // what the sums are to be multiplied by beside the rows' own

    std::uint32_t* tile(Index k, Index first, Index depth) const noexcept { return words.data() + (tokens * (k / group) + first * (depth / group)) * words_a_group; }

    // source.words(token, k, depth, to) gives a token's bytes, source.scale(token, column) a group's scale and source.power(token) what the token's scales are relative to; `constant` is the part of F
    // that all elements share.
    template <class Source>
    PackedTokens(const Source& source, Index tokens, Index cols, double constant, int threads) : tokens(tokens), cols(cols), words(tokens * (cols / group) * words_a_group) {
        for (Index token = 0; token < tokens; ++token) factors[static_cast<std::size_t>(token)] = constant * source.power(token);
        const Index chunks = (cols + depth_at_once - 1) / depth_at_once, tiles = (tokens + tile_tokens - 1) / tile_tokens;
        parallel_for(chunks * tiles, threads, [&](Index piece) {
            const Index k = piece / tiles * depth_at_once, depth = std::min(depth_at_once, cols - k), first = piece % tiles * tile_tokens, here = std::min(tile_tokens, tokens - first);
            for (Index j = 0; j < here; ++j) {
                alignas(cache_line) std::array<std::uint32_t, depth_at_once / 4> bytes;
                source.words(first + j, k, depth, bytes.data());
                std::uint32_t* to = tile(k, first, depth) + j;
                for (Index g = 0; g < depth / group; ++g, to += here * words_a_group) {
                    const std::uint32_t* from = bytes.data() + g * (group / 4);
                    to[0] = beginning(from);
                    to[here] = std::bit_cast<std::uint32_t>(source.scale(first + j, k + g * group));
                    for (Index i = 0; i < group / 4; ++i) to[here * (2 + i)] = from[i];
                }
            }
        });
    }

private:
    // Sums of the even and of the odd bytes of the words, each byte 128 more than it is so that none has a sign, lie side by side in a word.
    static std::uint32_t beginning(const std::uint32_t* bytes) noexcept {
        constexpr std::uint32_t every_other = 0x00FF00FFu;
        std::uint32_t pairs = 0;
        for (Index i = 0; i < group / 4; ++i) {
            const std::uint32_t raised = bytes[i] ^ 0x80808080u;
            pairs += (raised & every_other) + (raised >> 8 & every_other);
        }
        constexpr int raise = 128 * group / 2;
        return simd::beginning_of_sums(static_cast<int>(pairs & 0xFFFF) - raise, static_cast<int>(pairs >> 16) - raise);
    }
};

// Adds the products of 32 rows with a tile's tokens to `sums`, 32 a token.
template <class Format, Index group, bool exact, Index tokens>
void add_tile(const WeightTile<Format>& weights, const std::uint32_t* from, Index groups, float* sums) noexcept {
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
void add_tokens(const WeightTile<Format>& weights, const std::uint32_t* from, Index groups, Index count, float* sums) noexcept {
    if constexpr (tokens > 1)
        if (count < tokens) return add_tokens<Format, group, exact, tokens - 1>(weights, from, groups, count, sums);
    add_tile<Format, group, exact, tokens>(weights, from, groups, sums);
}

template <class Format, bool exact, Index group>
void multiply(const PackedTokens<group>& x, const PackedMatrix& weight, MatrixView<float> out, int threads) {
    parallel_for_ranges(weight.codes.rows, tile_rows, threads, [&](Index row, Index end) {
        // Sums of a token are adjacent here; in `out` tokens may lie a power of two apart, which would share one set of the caches.
        const Buffer<float> sums(x.tokens * tile_rows);
        std::fill_n(sums.data(), x.tokens * tile_rows, 0.0f);
        WeightTile<Format> tile(weight, row);
        for (Index k = 0; k < x.cols; k += depth_at_once) {
            const Index depth = std::min(depth_at_once, x.cols - k);
            tile.decode(k, depth);
            for (Index token = 0; token < x.tokens; token += tile_tokens)
                add_tokens<Format, group, exact>(tile, x.tile(k, token, depth), depth / group, std::min(tile_tokens, x.tokens - token), sums.data() + token * tile_rows);
        }
        for (Index token = 0; token < x.tokens; ++token)
            for (Index r = 0; r < end - row; ++r)
                out.row(token)[row + r] = static_cast<float>(sums.data()[token * tile_rows + r] * (x.factors[static_cast<std::size_t>(token)] * tile.factors[static_cast<std::size_t>(r)]));
    });
}

// Inputs in four bits.
template <class Format>
struct Codes {
    static constexpr bool relative = std::is_same_v<Format, Mxfp4>;

    MatrixView<const std::uint8_t> codes, scales;
    std::array<std::uint8_t, most_tokens> largest;

    Codes(MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales) noexcept : codes(codes), scales(scales) {
        for (Index token = 0; token < scales.rows; ++token) largest[static_cast<std::size_t>(token)] = *std::max_element(scales.row(token), scales.row(token) + scales.cols);
    }

    double power(Index token) const noexcept { return relative ? std::ldexp(1.0, largest[static_cast<std::size_t>(token)] - e8m0::bias) : 1.0; }

    float scale(Index token, Index column) const noexcept {
        const std::uint8_t byte = scales.row(token)[column / Format::group_size];
        return relative ? relative_scale(byte, largest[static_cast<std::size_t>(token)]) : Format::decode_scale(byte);
    }

    void words(Index token, Index k, Index depth, std::uint32_t* to) const noexcept {
        alignas(cache_line) std::uint32_t packed[depth_at_once / codes_a_word] = {}, even[simd::lanes], odd[simd::lanes];
        std::memcpy(packed, codes.row(token) + k / 2, static_cast<std::size_t>(depth / 2));
        for (Index word = 0; word < depth / codes_a_word; word += simd::lanes) {
            const simd::Words eight = simd::load(packed + word);
            simd::store(even, simd::doubled(eight & low_nibbles));
            simd::store(odd, simd::doubled(eight >> 4 & low_nibbles));
            for (Index i = 0; i < simd::lanes; ++i) {
                to[2 * (word + i)] = even[i];
                to[2 * (word + i) + 1] = odd[i];
            }
        }
    }
};

// Inputs in eight bits, rounded on the way.
template <class Format>
struct Rounded {
    static constexpr Index size = Format::group_size;

    MatrixView<const float> x;
    Index groups;
    Buffer<float> steps;
    std::array<int, most_tokens> exponents;

    Rounded(MatrixView<const float> x, int threads) : x(x), groups(x.cols / size), steps(x.rows * groups) {
        parallel_for_ranges(x.rows, rows_a_piece(x.cols), threads, [&](Index begin, Index end) {
            for (Index token = begin; token < end; ++token) {
                float* const to = steps.data() + token * groups;
                for (Index g = 0; g < groups; g += simd::lanes) {
                    const Index here = std::min<Index>(simd::lanes, groups - g);
                    alignas(cache_line) float rest[chunk_cols<Format>], found[simd::lanes];
                    const float* from = x.row(token) + g * size;
                    if (here < simd::lanes) {
                        std::fill(std::copy_n(from, here * size, rest), std::end(rest), 0.0f);
                        from = rest;
                    }
                    simd::store(found, simd::floats(group_maxima<Format>(from)) / 127.0f);
                    std::copy_n(found, here, to + g);
                }
                const float largest = *std::max_element(to, to + groups);
                exponents[static_cast<std::size_t>(token)] = largest > 0 ? std::ilogb(largest) : 0;
            }
        });
    }

    double power(Index token) const noexcept { return std::ldexp(1.0, exponents[static_cast<std::size_t>(token)]); }

    float step(Index token, Index column) const noexcept { return steps.data()[token * groups + column / size]; }

    float scale(Index token, Index column) const noexcept {
        const double relative = step(token, column) / power(token);
        return relative < std::ldexp(1.0, -least_power) ? 0.0f : static_cast<float>(relative);
    }

    void words(Index token, Index k, Index depth, std::uint32_t* to) const noexcept {
        using namespace simd;
        constexpr float most = 127, anchor = e2m1::anchor<float>;  // added, it leaves a whole number in the last bits
        alignas(cache_line) std::uint8_t bytes[depth_at_once];
        for (Index c = 0; c < depth; c += size) {
            const float own = step(token, k + c);
            const Floats divisor = splat(own > 0 ? own : 1.0f);
            for (Index i = c; i < c + size; i += lanes) {
                Floats quotient = load(x.row(token) + k + i) / divisor;
                quotient = select(quotient > most, splat(most), quotient);
                quotient = select(quotient < -most, splat(-most), quotient);
                store_bytes(bytes + i, bits(quotient + anchor) & 0xFFu);
            }
        }
        for (Index word = 0; word < depth / codes_a_word; ++word) {
            std::uint64_t eight;
            std::memcpy(&eight, bytes + word * codes_a_word, sizeof eight);
            to[2 * word] = every_other_byte(eight);
            to[2 * word + 1] = every_other_byte(eight >> 8);
        }
    }

private:
    static constexpr std::uint32_t every_other_byte(std::uint64_t eight) noexcept {
        eight &= 0x00FF00FF00FF00FFu;
        eight = (eight | eight >> 8) & 0x0000FFFF0000FFFFu;
        return static_cast<std::uint32_t>(eight | eight >> 16);
    }
};

// Calls f(first, count) for every most_tokens tokens.
template <class F>
void for_most_tokens(Index tokens, F&& f) {
    for (Index first = 0; first < tokens; first += most_tokens) f(first, std::min(most_tokens, tokens - first));
}

template <class T>
MatrixView<T> rows_of(MatrixView<T> matrix, Index first, Index count) noexcept {
    return {matrix.row(first), count, matrix.cols, matrix.row_stride};
}

void check_scales(const PackedMatrix& matrix, Index group_size, const char* name) {
    check(matrix.codes.cols * 2 % group_size == 0 && matrix.scales.rows == matrix.codes.rows && matrix.scales.cols * group_size == matrix.codes.cols * 2,
          "scales do not have one entry for each group of " + std::string(name));
}

void check_shapes(Index tokens, Index cols, const PackedMatrix& weight, MatrixView<float> out) {
    check(weight.codes.cols * 2 == cols, "x has " + std::to_string(cols) + " columns; the weight has " + std::to_string(weight.codes.cols * 2));
    check(out.rows == tokens && out.cols == weight.codes.rows, "out has shape (" + std::to_string(out.rows) + ", " + std::to_string(out.cols) + "); the product has (" + std::to_string(tokens) + ", " +
                                                                   std::to_string(weight.codes.rows) + ")");
}

}  // namespace

void matmul_packed(const PackedMatrix& x, const PackedMatrix& weight, MatrixView<float> out, int threads) {
    check_shapes(x.codes.rows, x.codes.cols * 2, weight, out);
    with_format(x.format, [&]<class Inputs>(Inputs) {
        with_format(weight.format, [&]<class Format>(Format) {
            check_scales(x, Inputs::group_size, "x");
            check_scales(weight, Format::group_size, "the weight");
            for_most_tokens(x.codes.rows, [&](Index first, Index count) {
                const Codes<Inputs> source(rows_of(x.codes, first, count), rows_of(x.scales, first, count));
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
            const Rounded<Format> source(rows_of(x, first, count), threads);
            multiply<Format, false>(PackedTokens<Format::group_size>(source, count, x.cols, 0.5 / weight.tensor_scale, threads), weight, rows_of(out, first, count), threads);
        });
    });
}

}  // namespace mrgptq
