#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "gptq/factor.h"
#include "gptq/forms.h"
#include "gptq/hessian.h"
#include "gptq/shift.h"
#include "gptq/solver.h"
#include "linalg/symmetric.h"

namespace mrgptq::bindings {

void register_gptq(py::module_& module) {
    fix_eigen_blocking();
    py::class_<Hessian>(module, "HessianSum")
        .def(py::init<Index>())
        .def("update",
             [](Hessian& self, const py::array& x, int threads) {
                 const auto in = view<float>(x);
                 without_gil([&] { self.update(in, threads); });
             })
        .def("merge", [](Hessian& self, const Hessian& other, int threads) { without_gil([&] { self.merge(other, threads); }); })
        .def("matrix",
             [](const Hessian& self, int threads) {
                 auto h = matrix<double>(self.cols(), self.cols());
                 const auto out = writable<double>(h);
                 without_gil([&] { self.matrix(out, threads); });
                 return h;
             })
        .def("take_matrix",
             [](Hessian& self, int threads) {
                 auto taken = std::make_unique<std::vector<double>>(without_gil([&] { return self.take_matrix(threads); }));
                 double* values = taken->data();
                 const py::capsule owner(taken.get(), [](void* held) { delete static_cast<std::vector<double>*>(held); });
                 taken.release();
                 return py::array_t<double>({self.cols(), self.cols()}, values, owner);
             })
        .def_property_readonly("cols", &Hessian::cols)
        .def_property_readonly("tokens", &Hessian::tokens);
    py::class_<Factor>(module, "CholeskyFactor")
        .def(py::init([](const py::array& h, const std::string& order, double damping, Index group_size, const std::string& precision, int threads) {
            const auto in = view<double>(h);
            return without_gil([&] { return std::make_unique<Factor>(in, order_named(order), damping, group_size, precision_named(precision), threads); });
        }))
        .def_property_readonly("order",
                               [](const Factor& self) {
                                   py::array_t<Index> order(static_cast<py::ssize_t>(self.order().size()));
                                   std::copy(self.order().begin(), self.order().end(), order.mutable_data());
                                   return order;
                               })
        .def_property_readonly("damping", &Factor::damping)
        .def_property_readonly("dead_columns", &Factor::dead_columns)
        .def_property_readonly("lambda_", &Factor::lambda)
        .def_property_readonly("dead_weight", &Factor::dead_weight)
        .def_property_readonly("usable", &Factor::usable);
    module.def("solve", [](const std::string& format, const py::array& weight, py::array& scales, float tensor_scale, const Factor& factor, const Factor* outputs, const std::string& precision, bool search_scales,
                           const std::string& mx_rule, int rounds, int threads) {
        const auto in = view<float>(weight);
        const auto in_out_scales = writable<std::uint8_t>(scales);
        auto codes = matrix<std::uint8_t>(in.rows, in.cols / 2);
        const auto out = writable<std::uint8_t>(codes);
        const SolverOptions options{precision_named(precision), search_scales, mx_rule_named(mx_rule), rounds};
        const SolverResult result = without_gil([&] { return solve(format, in, in_out_scales, tensor_scale, factor, outputs, options, out, threads); });
        return py::make_tuple(codes, result.losses);
    });
    module.def("shift_to_inputs", [](const py::array& weight, const py::array& cross, const std::optional<py::array>& stream, const py::array& h, const Factor& factor, double strength, int threads) {
        const auto in = view<float>(weight);
        const auto in_cross = view<double>(cross), in_h = view<double>(h);
        const auto in_stream = stream ? view<float>(*stream) : MatrixView<const float>{};
        auto target = matrix<float>(in.rows, in.cols);
        const auto out = writable<float>(target);
        without_gil([&] { shift_to_inputs(in, in_cross, in_stream, in_h, factor, strength, out, threads); });
        return target;
    });
    module.def("make_symmetric", [](const py::array& h, std::optional<py::array>& out, int threads) {
        const auto in = view<double>(h);
        const auto to = out ? writable<double>(*out) : MatrixView<double>{};
        const Symmetry found = without_gil([&] { return make_symmetric(in, to, threads); });
        return py::make_tuple(found.nonfinite, found.largest, found.apart, found.row, found.col);
    });
    module.def("quadratic_form", [](const py::array& e, const py::array& h, const std::string& precision, int threads) {
        const auto in = view<float>(e);
        const auto in_h = view<double>(h);
        const bool single = precision_named(precision) == Precision::float32;
        return without_gil([&] { return single ? quadratic_form<float>(in, in_h, threads) : quadratic_form<double>(in, in_h, threads); });
    });
    module.def("quadratic_forms", [](const py::array& w, const std::vector<py::array>& q, const py::array& h, const std::string& precision, int threads) {
        const auto in = view<float>(w);
        std::vector<MatrixView<const float>> in_q;
        for (const auto& less : q) in_q.push_back(view<float>(less));
        const auto in_h = view<double>(h);
        const bool single = precision_named(precision) == Precision::float32;
        return without_gil([&] { return single ? quadratic_forms<float>(in, in_q, in_h, threads) : quadratic_forms<double>(in, in_q, in_h, threads); });
    });
    module.def("coupled_form", [](const py::array& e, const py::array& a, const py::array& h, const std::string& precision, int threads) {
        const auto in = view<float>(e);
        const auto in_a = view<double>(a), in_h = view<double>(h);
        const bool single = precision_named(precision) == Precision::float32;
        return without_gil([&] { return single ? coupled_form<float>(in, in_a, in_h, threads) : coupled_form<double>(in, in_a, in_h, threads); });
    });
}

}  // namespace mrgptq::bindings
