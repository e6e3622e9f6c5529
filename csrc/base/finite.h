// Where a matrix holds what is no number.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>

#include "base/matrix_view.h"
#include "base/parallel.h"

namespace mrgptq {

// Magnitudes of floats order like their bits; infinity's is the first that is not finite.
inline constexpr std::uint32_t infinity_bits = 0x7F800000u;

// Rows that a thread takes at a time: some 32 KiB of float32 hide the handing out and still share a small matrix.
constexpr Index rows_a_piece(Index cols) noexcept { return std::max<Index>(1, (Index{1} << 13) / std::max<Index>(cols, 1)); }

// The least row that any thread notes.
class FirstRow {
public:
    void note(Index row) noexcept {
        Index known = row_.load(std::memory_order_relaxed);
        while (row < known && !row_.compare_exchange_weak(known, row, std::memory_order_relaxed)) {
        }
    }
    bool found() const noexcept { return row() != std::numeric_limits<Index>::max(); }
    Index row() const noexcept { return row_.load(std::memory_order_relaxed); }

private:
    std::atomic<Index> row_ = std::numeric_limits<Index>::max();
};

// Row-major position of the first NaN or infinity, -1 where all is finite.
inline Index first_nonfinite(MatrixView<const float> x, int threads) {
    FirstRow first;
    parallel_for_ranges(x.rows, rows_a_piece(x.cols), threads, [&](Index begin, Index end) {
        for (Index r = begin; r < end; ++r) {
            const float* row = x.row(r);
            // One flag a row lets the scan vectorise; the position is looked for only where there is one.
            std::uint32_t largest = 0;
            for (Index c = 0; c < x.cols; ++c) largest = std::max(largest, std::bit_cast<std::uint32_t>(row[c]) & 0x7FFFFFFFu);
            if (largest >= infinity_bits) return first.note(r);
        }
    });
    if (!first.found()) return -1;
    const float* row = x.row(first.row());
    const float* bad = std::find_if(row, row + x.cols, [](float value) { return (std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFFu) >= infinity_bits; });
    return first.row() * x.cols + (bad - row);
}

}  // namespace mrgptq
