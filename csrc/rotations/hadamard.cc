#include "rotations/hadamard.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "base/check.h"
#include "simd/butterflies.h"

namespace mrgptq {
namespace {

using namespace simd;

bool fits_registers(Index block_size) noexcept { return block_size <= most_block_vectors * lanes; }

float factor_of(Index block_size) noexcept { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(block_size))); }

// What goes on beside a rotation: begin(c, width) before columns [c, c + width) are read, see(v) for each vector that is written.
struct Nothing {
    void begin(Index, int) noexcept {}
    void see(Floats) noexcept {}
};

struct LargestMagnitude : Nothing {
    Words largest{};

    MRGPTQ_INLINE void see(Floats v) noexcept { largest = max(largest, magnitude_bits(v)); }
};

struct PrefetchOfQuarter : Nothing {
    const float* next;

    explicit PrefetchOfQuarter(const float* from) noexcept : next(from) {}
    MRGPTQ_INLINE void begin(Index c, int width) noexcept {
        for (int i = 0; i < width; i += 64) __builtin_prefetch(next + (c + i) / 4);
    }
};

// Blocks that fit the registers: each is read once, transformed, scaled and written once. A block narrower than the vectors shares them with its neighbours.
template <int vectors, int block, class Beside>
Beside rotate_in_registers(const float* x, Index cols, float factor, float* out, Beside beside) noexcept {
    constexpr Index width = vectors * lanes;
    const auto rotate = [&](const float* from, float* to) {
        Floats v[vectors];
        for (int i = 0; i < vectors; ++i) v[i] = load(from + i * lanes);
        transform<block>(v);
        for (int i = 0; i < vectors; ++i) {
            v[i] *= factor;
            beside.see(v[i]);
            store(to + i * lanes, v[i]);
        }
    };
    Index c = 0;
    for (; c + width <= cols; c += width) {
        beside.begin(c, width);
        rotate(x + c, out + c);
    }
    if (c < cols) {  // the last blocks, zeros beside them
        float rest[width] = {};
        std::copy(x + c, x + cols, rest);
        rotate(rest, rest);
        std::copy(rest, rest + (cols - c), out + c);
    }
    return beside;
}

// One pass over a block in cache for the widths half, 2 half, ... below vectors * half, scaled by `factor` where it is the last.
template <int vectors>
void combine(float* x, Index half, Index start, float factor, Words& largest) noexcept {
    for (Index c = start; c < start + half; c += lanes) {
        Floats v[vectors];
        for (int i = 0; i < vectors; ++i) v[i] = load(x + c + i * half);
        detail::across<vectors>(v);
        for (int i = 0; i < vectors; ++i) {
            v[i] *= factor;
            largest = max(largest, magnitude_bits(v[i]));
            store(x + c + i * half, v[i]);
        }
    }
}

// Wider ones: pieces of `width` in registers, then pass after pass over the block, which a cache holds.
std::uint32_t rotate_in_cache(const float* x, Index cols, Index block_size, float* out) noexcept {
    const float factor = factor_of(block_size);
    constexpr Index width = most_block_vectors * lanes;
    Words largest{};
    for (Index begin = 0; begin < cols; begin += block_size) {
        // No scaling yet, as the definition scales at the end; times one is exact.
        rotate_in_registers<most_block_vectors, width>(x + begin, block_size, 1.0f, out + begin, Nothing{});
        for (Index half = width; half < block_size;) {
            const Index ratio = std::min<Index>(block_size / half, 8);
            const bool last = ratio * half == block_size;
            const float scale = last ? factor : 1.0f;
            Words so_far{};
            for (Index start = begin; start < begin + block_size; start += ratio * half) {
                if (ratio == 2) combine<2>(out, half, start, scale, so_far);
                if (ratio == 4) combine<4>(out, half, start, scale, so_far);
                if (ratio == 8) combine<8>(out, half, start, scale, so_far);
            }
            if (last) largest = max(largest, so_far);
            half *= ratio;
        }
    }
    return largest_lane(largest);
}

// Blocks are rotated side by side until they make so many vectors: what is done to one is a chain of operations that wait for each other.
constexpr int vectors_beside = most_block_vectors / 2;

// Calls the kernel whose block is `block_size`, the largest of the registers' first.
template <int block = most_block_vectors * lanes, class Beside>
Beside rotate_by(const float* x, Index cols, Index block_size, float* out, Beside beside) noexcept {
    if (block_size == block) return rotate_in_registers<std::max(block / lanes, vectors_beside), block>(x, cols, factor_of(block), out, beside);
    if constexpr (block > 2) return rotate_by<block / 2>(x, cols, block_size, out, beside);
    return beside;
}

}  // namespace

void check_rotation(Index block_size, Index cols) {
    check(block_size >= 2 && std::has_single_bit(static_cast<std::size_t>(block_size)), "rotation block size is " + std::to_string(block_size) + "; it must be a power of two from 2 on");
    check(cols % block_size == 0, "the matrix has " + std::to_string(cols) + " columns; a rotation of block size " + std::to_string(block_size) + " needs a multiple of it");
}

std::uint32_t rotate_piece(const float* x, Index cols, Index block_size, float* out) noexcept {
    if (!fits_registers(block_size)) return rotate_in_cache(x, cols, block_size, out);
    return largest_lane(rotate_by(x, cols, block_size, out, LargestMagnitude{}).largest);
}

void rotate_and_prefetch(const float* x, Index cols, Index block_size, float* out, const float* next) noexcept {
    if (fits_registers(block_size))
        rotate_by(x, cols, block_size, out, PrefetchOfQuarter{next});
    else
        rotate_in_cache(x, cols, block_size, out);
}

}  // namespace mrgptq
