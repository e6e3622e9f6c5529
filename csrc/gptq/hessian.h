// The running second moment H = Xᵀ X / tokens of a layer's inputs.
//
// Tokens are gathered into panels of 256, counted from the start of the stream; each panel's product is float32 and is added in float64. So a sum of a million tokens keeps seven digits,
// and its bytes do not depend on how the stream was cut into batches, nor on the number of threads.
//
// Calls from several threads are taken one after the other.
#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "base/buffer.h"
#include "base/matrix_view.h"

namespace mrgptq {

class Hessian {
public:
    explicit Hessian(Index cols);

    // x (any number of tokens, cols), finite.
    void update(MatrixView<const float> x, int threads);

    // Adds another stream's sum behind this one's. Merging is associative up to float64 rounding; equal merges in equal order give equal bytes.
    void merge(const Hessian& other, int threads);

    // What update() and merge() have made of it: the sum over what is no panel under way, its lower triangle row by row, cols (cols + 1) / 2 numbers in one row, and the tokens of the panel under way.
    void state(MatrixView<double> sum, MatrixView<float> open) const;

    // One in that state, after so many tokens in all. Takes up where the other was: the same tokens later give the same bytes.
    Hessian(MatrixView<const double> sum, MatrixView<const float> open, Index tokens);

    // Writes H, both triangles, (cols, cols). All zero where no token was seen.
    void matrix(MatrixView<double> out, int threads) const;

    Index cols() const noexcept { return cols_; }
    Index tokens() const noexcept { return tokens_; }
    Index open_tokens() const noexcept { return panel_tokens_; }

private:
    MatrixView<double> view() noexcept { return {sum_.data(), cols_, cols_, cols_}; }
    void make_room();
    void empty_panel() noexcept;

    mutable std::mutex mutex_;
    Index cols_;
    std::atomic<Index> tokens_ = 0;
    std::vector<double> sum_;    // (cols, cols) row-major, lower triangle; empty until there is something in it
    Buffer<float> panel_;        // the panel under way, (256, 32) for each 32 columns, zero behind the last token
    std::atomic<Index> panel_tokens_ = 0;
};

}  // namespace mrgptq
