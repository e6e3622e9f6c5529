#include "rotations/rotation.h"

#include <algorithm>
#include <string>

#include "base/check.h"
#include "base/finite.h"
#include "base/parallel.h"
#include "rotations/hadamard.h"
#include "simd/vector.h"

namespace mrgptq {
namespace {

using namespace simd;

constexpr int most_across = 2;  // vectors of columns that are summed side by side
constexpr int sums = 8;         // vectors in all: blocks go side by side too, and what is read of the matrix serves all of them

// Adjacent blocks of a row, `count` of them, by the matrix at `t`. Returns the bits of the largest magnitude.
template <int across, int count>
Words multiply_blocks(const float* x, const float* t, Index k, Index stride, float* out) noexcept {
    constexpr Index width = across * lanes;
    Words largest{};
    for (Index first = 0; first < k; first += width) {
        Floats sum[count][across] = {};
        for (Index i = 0; i < k; ++i)
            for (int b = 0; b < count; ++b)
                for (int v = 0; v < across; ++v) sum[b][v] += splat(x[b * k + i]) * load(t + i * stride + first + v * lanes);
        for (int b = 0; b < count; ++b)
            for (int v = 0; v < across; ++v) {
                largest = max(largest, magnitude_bits(sum[b][v]));
                const Index place = first + v * lanes;
                if (place + lanes <= k) {  // a copy of so many numbers compilers make a call of, or a slow instruction
                    store(out + b * k + place, sum[b][v]);
                } else if (place < k) {
                    float values[lanes];
                    store(values, sum[b][v]);
                    std::copy_n(values, k - place, out + b * k + place);
                }
            }
    }
    return largest;
}

template <int across>
std::uint32_t multiply_across(const float* x, Index cols, const float* t, Index k, Index stride, float* out) noexcept {
    constexpr int beside = sums / across;
    Words largest{};
    Index c = 0;
    for (; c + beside * k <= cols; c += beside * k) largest = max(largest, multiply_blocks<across, beside>(x + c, t, k, stride, out + c));
    for (; c < cols; c += k) largest = max(largest, multiply_blocks<across, 1>(x + c, t, k, stride, out + c));
    return largest_lane(largest);
}

std::uint32_t multiply_piece(const float* x, Index cols, const float* t, Index k, Index stride, float* out) noexcept {
    return k > lanes ? multiply_across<most_across>(x, cols, t, k, stride, out) : multiply_across<1>(x, cols, t, k, stride, out);
}

}  // namespace

Rotation::Rotation(MatrixView<const float> block) : block_size_(block.rows), stride_((block.cols + most_across * lanes - 1) / (most_across * lanes) * (most_across * lanes)) {
    check(block.rows == block.cols && block.rows > 0, "rotation matrix has shape (" + std::to_string(block.rows) + ", " + std::to_string(block.cols) + "); it must be square and not empty");
    block_ = Buffer<float>(block_size_ * stride_);
    std::fill_n(block_.data(), block_size_ * stride_, 0.0f);
    for (Index i = 0; i < block_size_; ++i) std::copy_n(block.row(i), block_size_, block_.data() + i * stride_);
}

void Rotation::check_columns(Index cols) const {
    if (in_place()) return check_rotation(block_size_, cols);
    check(cols % block_size_ == 0, "the matrix has " + std::to_string(cols) + " columns; a rotation of block size " + std::to_string(block_size_) + " needs a multiple of it");
}

std::uint32_t Rotation::rotate_piece(const float* x, Index cols, float* out) const noexcept {
    return in_place() ? mrgptq::rotate_piece(x, cols, block_size_, out) : multiply_piece(x, cols, block_.data(), block_size_, stride_, out);
}

void Rotation::rotate_and_prefetch(const float* x, Index cols, float* out, const float* next) const noexcept {
    if (in_place())
        mrgptq::rotate_and_prefetch(x, cols, block_size_, out, next);
    else
        multiply_piece(x, cols, block_.data(), block_size_, stride_, out);
}

void refuse_overflow(Index row, Index block_size) {
    throw std::invalid_argument("row " + std::to_string(row) + " overflows float32 when it is rotated by blocks of " + std::to_string(block_size));
}

Index rotate_columns(MatrixView<const float> x, const Rotation& rotation, MatrixView<float> out, int threads) {
    rotation.check_columns(x.cols);
    check(out.rows == x.rows && out.cols == x.cols, "rotation: out has another shape than x");
    const bool over_itself = out.data == x.data, copies = over_itself && !rotation.in_place();
    FirstRow beyond;
    parallel_for_ranges(x.rows, rows_a_piece(x.cols), threads, [&](Index begin, Index end) {
        const Buffer<float> room(copies ? x.cols : 0);
        for (Index r = begin; r < end; ++r) {
            if (copies) std::copy_n(x.row(r), x.cols, room.data());
            if (rotation.rotate_piece(copies ? room.data() : x.row(r), x.cols, out.row(r)) >= infinity_bits) beyond.note(r);
        }
    });
    if (!beyond.found()) return -1;
    if (const Index position = over_itself ? -1 : first_nonfinite(x, threads); position >= 0) return position;
    refuse_overflow(beyond.row(), rotation.block_size());
}

}  // namespace mrgptq
