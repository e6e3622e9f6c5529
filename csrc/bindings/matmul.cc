#include "matmul/matmul.h"
#include "bindings/arrays.h"
#include "matmul/integer.h"

namespace mrgptq::bindings {

void register_matmul(py::module_& module) {
    module.def("matmul", [](const std::string& format, const py::array& x, const py::array& codes, const py::array& scales, float tensor_scale, py::array& out, int threads) {
        const auto in = view<float>(x);
        const auto in_codes = view<std::uint8_t>(codes), in_scales = view<std::uint8_t>(scales);
        const auto to = writable<float>(out);
        without_gil([&] { matmul(format, in, in_codes, in_scales, tensor_scale, to, threads); });
    });
    module.def("matmul_packed", [](const std::string& x_format, const py::array& x_codes, const py::array& x_scales, float x_tensor_scale, const std::string& format, const py::array& codes,
                                   const py::array& scales, float tensor_scale, py::array& out, int threads) {
        const PackedMatrix x{x_format, view<std::uint8_t>(x_codes), view<std::uint8_t>(x_scales), x_tensor_scale};
        const PackedMatrix weight{format, view<std::uint8_t>(codes), view<std::uint8_t>(scales), tensor_scale};
        const auto to = writable<float>(out);
        without_gil([&] { matmul_packed(x, weight, to, threads); });
    });
    module.def("matmul_int8", [](const py::array& x, const std::string& format, const py::array& codes, const py::array& scales, float tensor_scale, py::array& out, int threads) {
        const auto in = view<float>(x);
        const PackedMatrix weight{format, view<std::uint8_t>(codes), view<std::uint8_t>(scales), tensor_scale};
        const auto to = writable<float>(out);
        without_gil([&] { matmul_int8(in, weight, to, threads); });
    });
}

}  // namespace mrgptq::bindings
