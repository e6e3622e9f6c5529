// Some rows of a matrix, rotated where they are read, so that nobody holds a rotated copy of all of it.
#pragma once

#include "base/buffer.h"
#include "base/matrix_view.h"
#include "rotations/rotation.h"

namespace mrgptq {

// Rows [first, first + count): a copy where there is a rotation, the matrix's own where there is none. The matrix has been checked: the rotation's blocks divide its columns and overflow in none of its rows.
class RotatedRows {
public:
    RotatedRows(MatrixView<const float> x, const Rotation& rotation, Index first, Index count)
        : first_(first), room_(rotation ? count * x.cols : 0), view_{rotation ? room_.data() : x.row(first), count, x.cols, rotation ? x.cols : x.row_stride} {
        for (Index r = 0; rotation && r < count; ++r) rotation.rotate_piece(x.row(first + r), x.cols, room_.data() + r * x.cols);
    }

    MatrixView<const float> view() const noexcept { return view_; }  // from `first` on
    const float* row(Index r) const noexcept { return view_.row(r - first_); }  // the matrix's row r

private:
    Index first_;
    Buffer<float> room_;
    MatrixView<const float> view_;
};

}  // namespace mrgptq
