#include "bindings/arrays.h"
#include "rotations/hadamard.h"

namespace mrgptq::bindings {

void register_rotations(py::module_& module) {
    module.def("rotate_columns", [](const py::array& x, const py::object& turn, py::array& out, int threads) {
        const auto in = view<float>(x);
        const auto to = writable<float>(out);
        const Rotation rotation = rotation_of(turn);
        return without_gil([&] { return rotate_columns(in, rotation, to, threads); });
    });
    module.def("rotate_both", [](py::array& h, Index block_size, int threads) {
        const auto in_out = writable<double>(h);
        without_gil([&] { rotate_both(in_out, block_size, threads); });
    });
    module.def("rotate_hessian", [](py::array& h, Index block_size, int threads) {
        const auto in_place = writable<double>(h);
        without_gil([&] { rotate_hessian(in_place, block_size, threads); });
    });
}

}  // namespace mrgptq::bindings
