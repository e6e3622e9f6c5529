#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/parallel.h"
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
        .def(py::init([](const py::array& sum, const py::array& open, Index tokens) {
            const auto in_sum = view<double>(sum);
            const auto in_open = view<float>(open);
            return without_gil([&] { return std::make_unique<Hessian>(in_sum, in_open, tokens); });
        }))
        .def("state",
             [](const Hessian& self) {
                 auto sum = matrix<double>(1, self.cols() * (self.cols() + 1) / 2);
                 auto open = matrix<float>(self.open_tokens(), self.cols());
                 const auto to_sum = writable<double>(sum);
                 const auto to_open = writable<float>(open);
                 without_gil([&] { self.state(to_sum, to_open); });
                 return py::make_tuple(sum, open);
             })
        .def("matrix",
             [](const Hessian& self, py::array& out, int threads) {
                 const auto to = writable<double>(out);
                 without_gil([&] { self.matrix(to, threads); });
             })
        .def_property_readonly("cols", &Hessian::cols)
        .def_property_readonly("tokens", &Hessian::tokens);
    py::class_<SecondMoment>(module, "SecondMoment")
        .def(py::init([](const py::array& h) { return SecondMoment(view<double>(h)); }), py::keep_alive<1, 2>())
        .def("diagonal",
             [](const SecondMoment& self) {
                 py::array_t<double> diagonal(static_cast<py::ssize_t>(self.size()));
                 for (Index i = 0; i < self.size(); ++i) diagonal.mutable_data()[self.column(i)] = self.diagonal(i);
                 return diagonal;
             })
        .def("groups",
             [](const SecondMoment& self, Index size) {
                 auto groups = matrix<double>(self.size(), size);
                 const auto out = writable<double>(groups);
                 const auto places = self.places();
                 for (Index c = 0; c < self.size(); ++c)
                     for (Index j = 0; j < size; ++j) out.row(c)[j] = self.at(places[static_cast<std::size_t>(c)], places[static_cast<std::size_t>(c / size * size + j)]);
                 return groups;
             })
        .def("matrix", [](const SecondMoment& self, int threads) {
            auto h = matrix<double>(self.size(), self.size());
            const auto out = writable<double>(h);
            const auto places = self.places();
            without_gil([&] {
                parallel_for(self.size(), threads, [&](Index r) {
                    for (Index c = 0; c < self.size(); ++c) out.row(r)[c] = self.at(places[static_cast<std::size_t>(r)], places[static_cast<std::size_t>(c)]);
                });
            });
            return h;
        });
    py::class_<Factor>(module, "CholeskyFactor")
        .def_static("room",
                    [](Index cols) {
                        constexpr auto size = static_cast<py::ssize_t>(sizeof(double));
                        auto values = std::make_unique<Buffer<double>>(Factor::row_stride(cols) * cols);
                        double* const data = values->data();
                        const py::capsule owner(values.get(), [](void* held) { delete static_cast<Buffer<double>*>(held); });
                        values.release();
                        return py::array_t<double>({cols, cols}, {Factor::row_stride(cols) * size, size}, data, owner);
                    })
        .def(py::init([](py::array& h, const std::string& order, double damping, Index group_size, const std::string& precision, int threads) {
                 const auto room = writable<double>(h);
                 return without_gil([&] { return Factor::in_place(room, order_named(order), damping, group_size, precision_named(precision), threads); });
             }),
             py::keep_alive<1, 2>())
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
        .def_property_readonly("usable", &Factor::usable)
        .def("second_moment", &Factor::second_moment, py::keep_alive<0, 1>());
    module.def("solve", [](const std::string& format, const py::array& weight, const py::object& turn, py::array& scales, float tensor_scale, const Factor& factor, const Factor* outputs, const std::string& precision, bool search_scales,
                           const std::string& mx_rule, int rounds, int threads) {
        const auto in = view<float>(weight);
        const auto in_out_scales = writable<std::uint8_t>(scales);
        auto codes = matrix<std::uint8_t>(in.rows, in.cols / 2);
        const auto out = writable<std::uint8_t>(codes);
        const SolverOptions options{precision_named(precision), search_scales, mx_rule_named(mx_rule), rounds};
        const Rotation rotation = rotation_of(turn);
        const SolverResult result = without_gil([&] { return solve(format, in, in_out_scales, tensor_scale, factor, outputs, options, out, threads, rotation); });
        return py::make_tuple(codes, result.losses);
    });
    module.def("shift_to_inputs", [](const py::array& weight, const py::object& turn, const py::array& cross, const std::optional<py::array>& stream, const Factor& factor, double strength, int threads) {
        const auto in = view<float>(weight);
        const auto in_cross = view<double>(cross);
        const auto in_stream = stream ? view<float>(*stream) : MatrixView<const float>{};
        auto target = matrix<float>(in.rows, in.cols);
        const auto out = writable<float>(target);
        const Rotation rotation = rotation_of(turn);
        without_gil([&] { shift_to_inputs(in, in_cross, in_stream, factor, strength, out, threads, rotation); });
        return target;
    });
    module.def("make_symmetric", [](const py::array& h, std::optional<py::array>& out, int threads) {
        const auto in = view<double>(h);
        const auto to = out ? writable<double>(*out) : MatrixView<double>{};
        const Symmetry found = without_gil([&] { return make_symmetric(in, to, threads); });
        return py::make_tuple(found.nonfinite, found.largest, found.apart, found.row, found.col);
    });
    module.def("quadratic_forms", [](const py::array& w, const py::object& turn, const std::vector<PackedArrays>& q, const SecondMoment& h, const std::string& precision, int threads) {
        const auto in = view<float>(w);
        std::vector<PackedMatrix> in_q;
        for (const auto& less : q) in_q.push_back(packed(less));
        const bool single = precision_named(precision) == Precision::float32;
        const Rotation rotation = rotation_of(turn);
        return without_gil([&] { return single ? quadratic_forms<float>(in, in_q, h, threads, rotation) : quadratic_forms<double>(in, in_q, h, threads, rotation); });
    });
    module.def("coupled_form", [](const py::array& w, const py::object& turn, const std::optional<PackedArrays>& q, const SecondMoment& a, const SecondMoment& h, const std::string& precision, int threads) {
        const auto in = view<float>(w);
        const std::optional<PackedMatrix> in_q = q ? std::optional(packed(*q)) : std::nullopt;
        const bool single = precision_named(precision) == Precision::float32;
        const Rotation rotation = rotation_of(turn);
        return without_gil([&] { return single ? coupled_form<float>(in, in_q, a, h, threads, rotation) : coupled_form<double>(in, in_q, a, h, threads, rotation); });
    });
    module.def("diagonal_form", [](const py::array& w, const py::object& turn, const py::array& d, int threads) {
        const auto in = view<float>(w);
        const auto diagonal = view<double>(d);
        const Rotation rotation = rotation_of(turn);
        return without_gil([&] { return diagonal_form(in, diagonal, threads, rotation); });
    });
}

}  // namespace mrgptq::bindings
