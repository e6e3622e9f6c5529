#include "matmul/matmul.h"
#include "bindings/arrays.h"

namespace mrgptq::bindings {

void register_matmul(py::module_& module) {
    module.def("matmul", [](const std::string& format, const py::array& x, const py::array& codes, const py::array& scales, float tensor_scale, py::array& out, int threads) {
        const auto in = view<float>(x);
        const auto in_codes = view<std::uint8_t>(codes), in_scales = view<std::uint8_t>(scales);
        const auto to = writable<float>(out);
        without_gil([&] { matmul(format, in, in_codes, in_scales, tensor_scale, to, threads); });
    });
}

}  // namespace mrgptq::bindings
