// A block-diagonal map T on the columns of a matrix: every block of k columns is multiplied by a Hadamard matrix, or by any k x k matrix given at run time.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "base/matrix_view.h"

namespace mrgptq {

class Rotation {
public:
    // By a Hadamard matrix of that size, see hadamard.h; 0: none.
    Rotation(Index hadamard = 0) noexcept : block_size_(hadamard) {}
    // By `block` (k, k), k from 1 on, which is copied: a row x becomes x T. An element is the sum of its k products in the order of T's rows, begun at zero, each product and each sum rounded.
    explicit Rotation(MatrixView<const float> block);

    explicit operator bool() const noexcept { return block_size_ != 0; }
    Index block_size() const noexcept { return block_size_; }

    bool in_place() const noexcept { return block_.data() == nullptr; }  // whether a piece may be written over what it is read from

    // Refuses a size that no rotation has or that does not divide `cols`.
    void check_columns(Index cols) const;

    // A piece of a row, `cols` a multiple of the block size; `out` may be `x` where in_place(). Returns the bits of the largest magnitude written: from those of infinity on where a
    // sum overflowed or a value of x was not finite, since every value of a block is in each of its sums.
    std::uint32_t rotate_piece(const float* x, Index cols, float* out) const noexcept;

    // The same without the largest magnitude. Meanwhile a Hadamard rotation that fits the registers asks for the first quarter of the `cols` values from `next` on.
    void rotate_and_prefetch(const float* x, Index cols, float* out, const float* next) const noexcept;

private:
    Index block_size_, stride_ = 0;  // of a row of the matrix, zeros behind its columns
    Buffer<float> block_;            // empty for a Hadamard rotation
};

// Refuses because row `row` overflows: its values are within a factor k of float32's largest number.
[[noreturn]] void refuse_overflow(Index row, Index block_size);

// out = x T. `out` may be `x`; it may not overlap it otherwise. Throws where a sum overflows float32. Returns -1, or the row-major position of the first value of x that is not finite;
// `out` is then of no use. In place such a value is gone when it is found: ask first_nonfinite() before.
Index rotate_columns(MatrixView<const float> x, const Rotation& rotation, MatrixView<float> out, int threads);

}  // namespace mrgptq
