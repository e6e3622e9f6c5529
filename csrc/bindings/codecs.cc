#include "codecs/codec.h"

#include "base/parallel.h"
#include "bindings/arrays.h"
#include "codecs/packing.h"

namespace mrgptq::bindings {
namespace {

constexpr Index pack_grain = 64;  // rows a thread takes at a time

ScaleRule rule_named(const std::string& search, const std::string& mx_rule, bool bfloat16_sixth = false) { return {scale_search_named(search), mx_rule_named(mx_rule), bfloat16_sixth}; }

}  // namespace

void register_codecs(py::module_& module) {
    module.def("amax", [](const py::array& x, const py::object& turn, int threads) {
        const auto in = view<float>(x);
        const Rotation rotation = rotation_of(turn);
        return without_gil([&] { return amax(in, threads, rotation); });
    });
    module.def("first_nonfinite", [](const py::array& x, int threads) {
        const auto in = view<float>(x);
        return without_gil([&] { return first_nonfinite(in, threads); });
    });
    module.def("nvfp4_tensor_scale", &nvfp4_tensor_scale);
    module.def("mx_tensor_scale", [](const std::string& mx_rule) { return mx_tensor_scale(mx_rule_named(mx_rule)); });
    module.def("quantize", [](const std::string& format, const std::string& search, const std::string& mx_rule, bool bfloat16_sixth, const py::array& weight, const py::object& turn, float tensor_scale, int threads) {
        const auto in = view<float>(weight);
        auto codes = matrix<std::uint8_t>(in.rows, in.cols / 2);
        auto scales = matrix<std::uint8_t>(in.rows, with_format(format, [&](auto f) { return in.cols / decltype(f)::group_size; }));
        const auto to_codes = writable<std::uint8_t>(codes), to_scales = writable<std::uint8_t>(scales);
        const Rotation rotation = rotation_of(turn);
        const Index position = without_gil([&] { return quantize(format, rule_named(search, mx_rule, bfloat16_sixth), in, tensor_scale, to_codes, to_scales, threads, rotation); });
        return py::make_tuple(codes, scales, position);
    });
    module.def("find_scales", [](const std::string& format, const std::string& search, const std::string& mx_rule, const py::array& weight, const py::object& turn, float tensor_scale, const py::object& hessian, int threads) {
        const auto in = view<float>(weight);
        const auto moment = hessian.is_none() ? MatrixView<const double>{nullptr, 0, 0, 0} : view<double>(py::reinterpret_borrow<py::array>(hessian));
        auto scales = matrix<std::uint8_t>(in.rows, with_format(format, [&](auto f) { return in.cols / decltype(f)::group_size; }));
        const auto out = writable<std::uint8_t>(scales);
        const Rotation rotation = rotation_of(turn);
        without_gil([&] { find_scales(format, rule_named(search, mx_rule), in, tensor_scale, moment, out, threads, rotation); });
        return scales;
    });
    module.def("encode", [](const std::string& format, const py::array& weight, const py::object& turn, const py::array& scales, float tensor_scale, int threads) {
        const auto in = view<float>(weight);
        const auto in_scales = view<std::uint8_t>(scales);
        auto codes = matrix<std::uint8_t>(in.rows, in.cols / 2);
        const auto out = writable<std::uint8_t>(codes);
        const Rotation rotation = rotation_of(turn);
        without_gil([&] { encode(format, in, in_scales, tensor_scale, out, threads, rotation); });
        return codes;
    });
    module.def("dequantize", [](const std::string& format, const py::array& codes, const py::array& scales, float tensor_scale, int threads) {
        const auto in = view<std::uint8_t>(codes);
        const auto in_scales = view<std::uint8_t>(scales);
        auto values = matrix<float>(in.rows, in.cols * 2);
        const auto out = writable<float>(values);
        without_gil([&] { dequantize(format, in, in_scales, tensor_scale, out, threads); });
        return values;
    });
    module.def("dequantize_into", [](const std::string& format, const py::array& codes, const py::array& scales, float tensor_scale, py::array& out, int threads) {
        const auto in = view<std::uint8_t>(codes);
        const auto in_scales = view<std::uint8_t>(scales);
        const auto to = writable<float>(out);
        without_gil([&] { dequantize(format, in, in_scales, tensor_scale, to, threads); });
    });
    module.def("round_to_grid",
               [](const std::string& format, const std::string& search, const std::string& mx_rule, bool bfloat16_sixth, const py::array& x, const py::object& turn, float tensor_scale, py::array& out, int threads) {
                   const auto in = view<float>(x);
                   const auto to = writable<float>(out);
                   const Rotation rotation = rotation_of(turn);
                   return without_gil([&] { return round_to_grid(format, rule_named(search, mx_rule, bfloat16_sixth), in, tensor_scale, to, threads, rotation); });
               });
    module.def("square_sums", [](const std::string& format, const py::array& weight, const py::object& turn, const py::array& codes, const py::array& scales, float tensor_scale, int threads) {
        const auto in = view<float>(weight);
        const auto in_codes = view<std::uint8_t>(codes), in_scales = view<std::uint8_t>(scales);
        const Rotation rotation = rotation_of(turn);
        const SquareSums sums = without_gil([&] { return square_sums(format, in, in_codes, in_scales, tensor_scale, threads, rotation); });
        return py::make_tuple(sums.error, sums.energy);
    });
    module.def("fit_sums", [](const std::string& format, const py::array& weight, const py::object& turn, const py::array& codes, const py::array& scales, float tensor_scale, int threads) {
        const auto in = view<float>(weight);
        const auto in_codes = view<std::uint8_t>(codes), in_scales = view<std::uint8_t>(scales);
        const Rotation rotation = rotation_of(turn);
        const FitSums sums = without_gil([&] { return fit_sums(format, in, in_codes, in_scales, tensor_scale, threads, rotation); });
        return py::make_tuple(sums.error, sums.dot, sums.square);
    });
    module.def("pack", [](const py::array& codes, int threads) {
        const auto in = view<std::uint8_t>(codes);
        auto packed = matrix<std::uint8_t>(in.rows, in.cols / 2);
        const auto out = writable<std::uint8_t>(packed);
        without_gil([&] {
            parallel_for_ranges(in.rows, pack_grain, threads, [&](Index begin, Index end) {
                for (Index r = begin; r < end; ++r) pack_row(in.row(r), in.cols, out.row(r));
            });
        });
        return packed;
    });
    module.def("unpack", [](const py::array& packed, int threads) {
        const auto in = view<std::uint8_t>(packed);
        auto codes = matrix<std::uint8_t>(in.rows, in.cols * 2);
        const auto out = writable<std::uint8_t>(codes);
        without_gil([&] {
            parallel_for_ranges(in.rows, pack_grain, threads, [&](Index begin, Index end) {
                for (Index r = begin; r < end; ++r) unpack_row(in.row(r), out.cols, out.row(r));
            });
        });
        return codes;
    });
}

}  // namespace mrgptq::bindings
