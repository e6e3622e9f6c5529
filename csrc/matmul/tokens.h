// Inputs of a product in whole numbers, as its tile reads them: bytes in the order that decoding gives the weight's codes, and scales.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "base/buffer.h"
#include "base/finite.h"
#include "base/parallel.h"
#include "codecs/chunk.h"
#include "formats/block_format.h"
#include "matmul/relative_scales.h"
#include "matmul/weight.h"
#include "simd/dot.h"

namespace mrgptq {

inline constexpr Index tile_tokens = simd::lanes == 16 ? 4 : 2;  // by two vectors of rows: as many sums as leave registers for the rest
inline constexpr Index depth_at_once = 512;                      // columns: of 32 rows they fill half of the first cache
inline constexpr Index most_tokens = 512;                        // packed at once
inline constexpr std::uint32_t low_nibbles = 0x0F0F0F0Fu;

// Inputs in four bits.
template <class Format>
struct PackedInputs {
    static constexpr bool relative = std::is_same_v<Format, Mxfp4>;

    MatrixView<const std::uint8_t> codes, scales;
    std::array<std::uint8_t, most_tokens> largest = {};

    PackedInputs(MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales) noexcept : codes(codes), scales(scales) {
        for (Index token = 0; token < scales.rows && relative; ++token)
            for (Index g = 0; g < scales.cols; ++g) largest[static_cast<std::size_t>(token)] = std::max(largest[static_cast<std::size_t>(token)], scales.row(token)[g]);
    }

    double power(Index token) const noexcept { return relative ? power_of_row(largest[static_cast<std::size_t>(token)] - e8m0::bias) : 1.0; }

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
struct RoundedInputs {
    static constexpr Index size = Format::group_size;

    MatrixView<const float> x;
    Index groups;
    Buffer<float> steps;
    std::array<double, most_tokens> powers;

    RoundedInputs(MatrixView<const float> x, int threads) : x(x), groups(x.cols / size), steps(x.rows * groups) {
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
                float largest = 0;
                for (Index g = 0; g < groups; ++g) largest = std::max(largest, to[g]);
                powers[static_cast<std::size_t>(token)] = power_of_row(largest > 0 ? std::ilogb(largest) : 0);
            }
        });
    }

    double power(Index token) const noexcept { return powers[static_cast<std::size_t>(token)]; }

    float step(Index token, Index column) const noexcept { return steps.data()[token * groups + column / size]; }

    float scale(Index token, Index column) const noexcept {
        const double relative = step(token, column) / power(token);
        return relative < least_scale ? 0.0f : static_cast<float>(relative);
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

}  // namespace mrgptq
