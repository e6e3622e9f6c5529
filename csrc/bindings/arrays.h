// The one place where numpy arrays become views and where the GIL is let go.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>

#include "base/check.h"
#include "base/matrix_view.h"
#include "codecs/codec.h"
#include "rotations/rotation.h"

namespace mrgptq::bindings {

namespace py = pybind11;

// A 2-D array of T whose columns are adjacent; Python's door copies every other one before it comes here. Nothing is converted: a copy would hide a wrong dtype and lose what is written.
template <class T>
MatrixView<const T> view(const py::array& array) {
    if (!py::isinstance<py::array_t<T, 0>>(array))  // NumPy takes longer to spell out the types than a small product does
        check(false, "expected an array of " + std::string(py::str(py::dtype::of<T>())) + ", got " + std::string(py::str(array.dtype())));
    if (array.ndim() != 2) check(false, "expected a matrix, got an array of rank " + std::to_string(array.ndim()));
    constexpr auto size = static_cast<py::ssize_t>(sizeof(T));
    // numpy gives an empty array strides of its own choosing.
    check(array.size() == 0 || ((array.shape(1) <= 1 || array.strides(1) == size) && array.strides(0) % size == 0), "expected adjacent columns");
    return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1), array.strides(0) / size};
}

template <class T>
MatrixView<T> writable(py::array& array) {
    const auto read = view<T>(array);
    return {static_cast<T*>(array.mutable_data()), read.rows, read.cols, read.row_stride};
}

template <class T>
py::array_t<T> matrix(Index rows, Index cols) {
    return py::array_t<T>({rows, cols});
}

// A rotation as Python hands it over: the block size of a Hadamard rotation, 0 for none, or the matrix of another.
inline Rotation rotation_of(const py::object& given) { return py::isinstance<py::array>(given) ? Rotation(view<float>(py::reinterpret_borrow<py::array>(given))) : Rotation(given.cast<Index>()); }

// A packed matrix as Python hands it over: format, codes, scales and tensor scale.
using PackedArrays = std::tuple<std::string, py::array, py::array, float>;

inline PackedMatrix packed(const PackedArrays& from) {
    const auto& [format, codes, scales, tensor_scale] = from;
    return {format, view<std::uint8_t>(codes), view<std::uint8_t>(scales), tensor_scale};
}

template <class Work>
decltype(auto) without_gil(Work&& work) {
    py::gil_scoped_release release;
    return std::forward<Work>(work)();
}

void register_formats(py::module_& module);
void register_codecs(py::module_& module);
void register_rotations(py::module_& module);
void register_gptq(py::module_& module);
void register_matmul(py::module_& module);

}  // namespace mrgptq::bindings
