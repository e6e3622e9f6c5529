#include "matmul/matmul.h"
#include "bindings/arrays.h"
#include "matmul/integer.h"
#include "matmul/tiles.h"

namespace mrgptq::bindings {
namespace {

// A tiled matrix as Python hands it over: format, rows, codes, scales and tensor scale.
using TiledArrays = std::tuple<std::string, Index, py::array, py::array, float>;

Weight weight_of(const PackedArrays& from) { return packed(from); }

TiledMatrix tiled(const TiledArrays& from) {
    const auto& [format, rows, codes, scales, tensor_scale] = from;
    return {format, rows, view<std::uint32_t>(codes), view<std::uint32_t>(scales), tensor_scale};
}

Weight weight_of(const TiledArrays& from) { return tiled(from); }

template <class Arrays>
void register_products(py::module_& module) {
    module.def("matmul", [](const py::array& x, const Arrays& weight, py::array& out, int threads) {
        const auto in = view<float>(x);
        const Weight w = weight_of(weight);
        const auto to = writable<float>(out);
        without_gil([&] { matmul(in, w, to, threads); });
    });
    module.def("matmul_packed", [](const PackedArrays& x, const Arrays& weight, py::array& out, int threads) {
        const PackedMatrix in = packed(x);
        const Weight w = weight_of(weight);
        const auto to = writable<float>(out);
        without_gil([&] { matmul_packed(in, w, to, threads); });
    });
    module.def("matmul_int8", [](const py::array& x, const Arrays& weight, py::array& out, int threads) {
        const auto in = view<float>(x);
        const Weight w = weight_of(weight);
        const auto to = writable<float>(out);
        without_gil([&] { matmul_int8(in, w, to, threads); });
    });
}

}  // namespace

void register_matmul(py::module_& module) {
    register_products<PackedArrays>(module);
    register_products<TiledArrays>(module);
    module.def("make_tiles", [](const PackedArrays& matrix, py::array& codes, py::array& scales, int threads) {
        const PackedMatrix from = packed(matrix);
        const auto code_tiles = writable<std::uint32_t>(codes), scale_tiles = writable<std::uint32_t>(scales);
        without_gil([&] { make_tiles(from, code_tiles, scale_tiles, threads); });
    });
    module.def("read_tiles", [](const TiledArrays& tiles, py::array& codes, py::array& scales, int threads) {
        const TiledMatrix from = tiled(tiles);
        const auto to_codes = writable<std::uint8_t>(codes), to_scales = writable<std::uint8_t>(scales);
        without_gil([&] { read_tiles(from, to_codes, to_scales, threads); });
    });
}

}  // namespace mrgptq::bindings
