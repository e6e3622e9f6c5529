#include "linalg/symmetric.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "base/parallel.h"

namespace mrgptq {
namespace {

constexpr Index tile = 64;  // rows and columns that are read together with their mirror image: 64 KiB of the first caches' neighbourhood

Index tiles_of(Index n) noexcept { return (n + tile - 1) / tile; }

// body(r, begin, end) for every row r of a stripe of tiles and each range of columns [begin, end) on or above the diagonal, tile by tile.
template <class Body>
void visit_upper(Index stripe, Index n, Body&& body) {
    const Index last = std::min((stripe + 1) * tile, n);
    for (Index col = stripe * tile; col < n; col += tile)
        for (Index r = stripe * tile; r < last; ++r) body(r, std::max(col, r), std::min(col + tile, n));
}

}  // namespace

Symmetry measure_symmetry(MatrixView<const double> h, int threads) {
    const Index n = h.rows;
    std::vector<Symmetry> found(static_cast<std::size_t>(tiles_of(n)));
    parallel_for(tiles_of(n), threads, [&](Index stripe) {
        Symmetry mine;
        for (Index r = stripe * tile; r < std::min((stripe + 1) * tile, n) && mine.nonfinite < 0; ++r)
            for (Index c = 0; c < n; ++c)
                if (!std::isfinite(h.row(r)[c])) {
                    mine.nonfinite = r * n + c;
                    break;
                }
        visit_upper(stripe, n, [&](Index r, Index begin, Index end) {
            for (Index c = begin; c < end; ++c) {
                const double a = h.row(r)[c], b = h.row(c)[r], apart = std::fabs(a - b);
                mine.largest = std::max({mine.largest, std::fabs(a), std::fabs(b)});
                if (apart > mine.apart || (apart == mine.apart && apart > 0 && std::tie(r, c) < std::tie(mine.row, mine.col))) {
                    mine.apart = apart;
                    mine.row = r;
                    mine.col = c;
                }
            }
        });
        found[static_cast<std::size_t>(stripe)] = mine;
    });
    Symmetry all;
    for (const Symmetry& mine : found) {
        if (all.nonfinite < 0) all.nonfinite = mine.nonfinite;
        all.largest = std::max(all.largest, mine.largest);
        if (mine.apart > all.apart) std::tie(all.apart, all.row, all.col) = std::tie(mine.apart, mine.row, mine.col);
    }
    return all;
}

void make_symmetric(MatrixView<double> h, int threads) {
    parallel_for(tiles_of(h.rows), threads, [&](Index stripe) {
        visit_upper(stripe, h.rows, [&](Index r, Index begin, Index end) {
            for (Index c = begin; c < end; ++c) h.row(r)[c] = h.row(c)[r] = 0.5 * (h.row(r)[c] + h.row(c)[r]);
        });
    });
}

void mirror_lower(MatrixView<double> h, int threads) {
    parallel_for(tiles_of(h.rows), threads, [&](Index stripe) {
        visit_upper(stripe, h.rows, [&](Index r, Index begin, Index end) {
            for (Index c = begin; c < end; ++c) h.row(r)[c] = h.row(c)[r];
        });
    });
}

}  // namespace mrgptq
