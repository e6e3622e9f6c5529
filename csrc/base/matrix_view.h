// A matrix somebody else owns: pointer, shape and the distance between rows. Columns are always adjacent; whoever holds other strides copies first.
#pragma once

#include <cstddef>
#include <type_traits>

namespace mrgptq {

using Index = std::ptrdiff_t;

template <class T>
struct MatrixView {
    T* data = nullptr;
    Index rows = 0;
    Index cols = 0;
    Index row_stride = 0;  // in elements; negative for an array that was flipped upside down

    T* row(Index r) const noexcept { return data + r * row_stride; }

    // A writable view serves wherever a read-only one is asked for.
    operator MatrixView<const T>() const noexcept
        requires(!std::is_const_v<T>)
    {
        return {data, rows, cols, row_stride};
    }
};

}  // namespace mrgptq
