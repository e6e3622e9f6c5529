// P = E R of a band of rows, kept over the rounds of refinement. When a block of columns is visited again, P lacks what the groups have moved since: of each group its last move, in this round or
// the one before. Few rows move a group, so P lies by rows and the moves of a group by the rows that made them: right factors of the kernel, whose left factor is R and whose columns are rows of P.
// An element of P takes one chain a move, in the order of the groups, so its bytes depend on its row alone.
#pragma once

#include <array>
#include <vector>

#include "gptq/rows.h"
#include "gptq/tile.h"

namespace mrgptq {

// R as the left factor: with lanes along its columns.
template <class Real>
using LeftStrips = Strips<Real, kernel_rows<Real>>;

template <class Real>
class Gradients {
public:
    Gradients(Index tiles, Index cols, Index group_size)
        : group_size_(group_size), spare_(tiles * lanes), p_(static_cast<std::size_t>((cols + block - 1) / block * block * (spare_ + 1))), moves_(static_cast<std::size_t>(cols / group_size)) {}

    // The columns [begin, begin + width) of a tile, from and to lanes.
    void store(Index tile, Index begin, Index width, const Tile<Real>& p) noexcept {
        for (Index r = 0; r < lanes; ++r) {
            Real* to = p_.data() + place(begin, tile * lanes + r);
            for (Index j = 0; j < width; ++j) to[j] = p(r, j);
        }
    }
    void load(Index tile, Index begin, Index width, Tile<Real>& p) const noexcept {
        rows_to_lanes(MatrixView<const Real>{p_.data() + place(begin, 0), spare_, width, block}, tile * lanes, p.data(), [](Index c) { return c; });
    }

    // Adds the moves of the groups from column `first` on, as many columns as `piece` is deep, times R's rows there and columns [begin, begin + width), which are `piece`.
    void follow(const LeftStrips<Real>& piece, Index first, Index begin, Index width) noexcept {
        for (Index k = 0; k < piece.depth; k += group_size_) {
            const Moves& moves = moves_[static_cast<std::size_t>((first + k) / group_size_)];
            for (Index i = 0; i < moves.count; i += kernel_cols) {
                std::array<Real*, kernel_cols> rows;
                for (std::size_t lane = 0; lane < rows.size(); ++lane) rows[lane] = p_.data() + place(begin, moves.rows[static_cast<std::size_t>(i) + lane]);
                for (Index j = 0; j < width; j += kernel_rows<Real>)
                    multiply_tile<Real, false>(group_size_, piece.data.data() + j * piece.depth + k * kernel_rows<Real>, kernel_rows<Real>, moves.changes.data() + i * group_size_, kernel_cols,
                                               [&](Index lane) { return rows[static_cast<std::size_t>(lane)] + j; });
            }
        }
    }

    // Moves of the groups in [begin, end): none, until a tile's are added; those of no move are zero.
    void forget(Index begin, Index end) noexcept {
        for (Index g = begin / group_size_; g < end / group_size_; ++g) moves_[static_cast<std::size_t>(g)].count = 0;
    }
    void add(Index tile, Index begin, Index end, const Tile<Real>& changes) {
        for (Index first = begin; first < end; first += group_size_) {
            const auto change = changes.middleCols(first - begin, group_size_);
            const Lane<Real> size = change.cwiseAbs().rowwise().maxCoeff().array();
            for (Index r = 0; r < lanes; ++r)
                if (size[r] > 0) add_row(moves_[static_cast<std::size_t>(first / group_size_)], tile * lanes + r, change.row(r));
        }
    }

private:
    // The rows of a band that moved a group, and their changes: (group_size, count) in strips of the kernel, the last one filled up with zeros for the spare row.
    struct Moves {
        Index count = 0;
        std::vector<Index> rows;
        std::vector<Real> changes;
    };

    template <class Change>
    void add_row(Moves& moves, Index row, const Change& change) {
        const Index lane = moves.count % kernel_cols, strip = moves.count - lane;
        if (lane == 0) {
            moves.rows.resize(static_cast<std::size_t>(strip));
            moves.rows.resize(static_cast<std::size_t>(strip + kernel_cols), spare_);
            moves.changes.resize(static_cast<std::size_t>(strip * group_size_));
            moves.changes.resize(static_cast<std::size_t>((strip + kernel_cols) * group_size_));
        }
        moves.rows[static_cast<std::size_t>(moves.count++)] = row;
        for (Index k = 0; k < group_size_; ++k) moves.changes[static_cast<std::size_t>(strip * group_size_ + k * kernel_cols + lane)] = change[k];
    }

    // Where row r begins in the block of columns that begins at `begin`. Only the block at position 0 may be narrower than the others.
    Index place(Index begin, Index r) const noexcept { return ((begin + block - 1) / block * (spare_ + 1) + r) * block; }

    Index group_size_, spare_;  // behind the band's rows one more, which takes the zeros of strips that are not full
    Aligned<Real> p_;           // block of columns by block, (rows + 1, block) each
    std::vector<Moves> moves_;  // by group
};

}  // namespace mrgptq
