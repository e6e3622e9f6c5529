#include "matmul/matmul.h"
#include "bindings/arrays.h"
#include "matmul/integer.h"

namespace mrgptq::bindings {

void register_matmul(py::module_& module) {
    module.def("matmul", [](const py::array& x, const PackedArrays& weight, py::array& out, int threads) {
        const auto in = view<float>(x);
        const PackedMatrix w = packed(weight);
        const auto to = writable<float>(out);
        without_gil([&] { matmul(in, w, to, threads); });
    });
    module.def("matmul_packed", [](const PackedArrays& x, const PackedArrays& weight, py::array& out, int threads) {
        const PackedMatrix in = packed(x), w = packed(weight);
        const auto to = writable<float>(out);
        without_gil([&] { matmul_packed(in, w, to, threads); });
    });
    module.def("matmul_int8", [](const py::array& x, const PackedArrays& weight, py::array& out, int threads) {
        const auto in = view<float>(x);
        const PackedMatrix w = packed(weight);
        const auto to = writable<float>(out);
        without_gil([&] { matmul_int8(in, w, to, threads); });
    });
}

}  // namespace mrgptq::bindings
