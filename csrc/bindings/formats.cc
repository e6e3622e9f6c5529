#include "bindings/arrays.h"
#include "formats/block_format.h"

namespace mrgptq::bindings {

void register_formats(py::module_& module) {
    module.def("encode_e2m1", py::vectorize([](float x) { return e2m1::encode(x); }));
    module.def("decode_e2m1", py::vectorize([](std::uint8_t code) { return e2m1::decode(code); }));
    module.def("encode_e4m3", py::vectorize([](float x) { return e4m3::encode(x); }));
    module.def("decode_e4m3", py::vectorize([](std::uint8_t bits) { return e4m3::decode(bits); }));
    module.def("encode_e8m0", py::vectorize([](float x) { return e8m0::encode(x); }));
    module.def("decode_e8m0", py::vectorize([](std::uint8_t bits) { return e8m0::decode(bits); }));
    module.def("group_size", [](const std::string& format) { return with_format(format, [](auto f) { return decltype(f)::group_size; }); });
}

}  // namespace mrgptq::bindings
