// A symmetric matrix as the reports and the shift read it: one that somebody holds, or what a factor keeps of the H that it factorised, whose columns stand in the order of its visits.
#pragma once

#include <algorithm>
#include <vector>

#include "base/matrix_view.h"

namespace mrgptq {

class SecondMoment {
public:
    // h (n, n), both triangles equal.
    SecondMoment(MatrixView<const double> h) noexcept : below_(h) {}
    // The diagonal lies beside what is strictly below it; `columns` says which column stands at each place.
    SecondMoment(MatrixView<const double> below, const double* diagonal, const Index* columns) noexcept : below_(below), diagonal_(diagonal), columns_(columns) {}

    Index size() const noexcept { return below_.cols; }
    bool square_of(Index n) const noexcept { return below_.rows == n && below_.cols == n; }

    Index column(Index place) const noexcept { return columns_ == nullptr ? place : columns_[place]; }
    std::vector<Index> places() const {  // by column
        std::vector<Index> places(static_cast<std::size_t>(size()));
        for (Index place = 0; place < size(); ++place) places[static_cast<std::size_t>(column(place))] = place;
        return places;
    }

    // By place.
    MatrixView<const double> below() const noexcept { return below_; }  // of which what is strictly below the diagonal counts
    double diagonal(Index i) const noexcept { return diagonal_ == nullptr ? below_.row(i)[i] : diagonal_[i]; }
    double at(Index i, Index j) const noexcept { return i == j ? diagonal(i) : below_.row(std::max(i, j))[std::min(i, j)]; }

private:
    MatrixView<const double> below_;
    const double* diagonal_ = nullptr;
    const Index* columns_ = nullptr;
};

}  // namespace mrgptq
