// The core's leaf kernels on one thread and on a matrix that stays in the second-level cache: what is left of the machine when memory does not matter.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "codecs/codec.h"
#include "codecs/packing.h"
#include "formats/e2m1.h"
#include "gptq/hessian.h"
#include "linalg/cholesky.h"
#include "linalg/lanes.h"
#include "rotations/rotation.h"

namespace {

using namespace mrgptq;

constexpr Index rows = 16, cols = 2048;  // 128 KiB of float32

std::vector<float> normal_values() {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    std::vector<float> values(rows * cols);
    for (float& value : values) value = normal(generator);
    return values;
}

struct Matrix {
    std::vector<float> values = normal_values(), out = std::vector<float>(rows * cols);
    std::vector<std::uint8_t> scales = std::vector<std::uint8_t>(rows * cols / 16), codes = std::vector<std::uint8_t>(rows * cols / 2);

    MatrixView<const float> in() const { return {values.data(), rows, cols, cols}; }
    MatrixView<float> to() { return {out.data(), rows, cols, cols}; }
    MatrixView<std::uint8_t> packed() { return {codes.data(), rows, cols / 2, cols / 2}; }
    MatrixView<std::uint8_t> scale_view(std::string_view format) {
        const Index groups = with_format(format, [](auto f) { return cols / decltype(f)::group_size; });
        return {scales.data(), rows, groups, groups};
    }
};

float divisor(std::string_view format, const Matrix& m) { return format == "nvfp4" ? nvfp4_tensor_scale(amax(m.in(), 1)) : 1.0f; }

void count_elements(benchmark::State& state, Index each = rows * cols) { state.SetItemsProcessed(state.iterations() * each); }

void find_scales_by(benchmark::State& state, const std::string& format, ScaleSearch search) {
    Matrix m;
    const float g = divisor(format, m);
    for (auto _ : state) find_scales(format, {search, MxRule::even}, m.in(), g, {}, m.scale_view(format), 1);
    count_elements(state);
}

void encode_codes(benchmark::State& state, const std::string& format) {
    Matrix m;
    const float g = divisor(format, m);
    find_scales(format, {}, m.in(), g, {}, m.scale_view(format), 1);
    for (auto _ : state) encode(format, m.in(), m.scale_view(format), g, m.packed(), 1);
    count_elements(state);
}

void decode_codes(benchmark::State& state, const std::string& format) {
    Matrix m;
    const float g = divisor(format, m);
    find_scales(format, {}, m.in(), g, {}, m.scale_view(format), 1);
    encode(format, m.in(), m.scale_view(format), g, m.packed(), 1);
    for (auto _ : state) dequantize(format, m.packed(), m.scale_view(format), g, m.to(), 1);
    count_elements(state);
}

void hadamard(benchmark::State& state) {
    Matrix m;
    for (auto _ : state) rotate_columns(m.in(), state.range(0), m.to(), 1);
    count_elements(state);
}

void dense_rotation(benchmark::State& state) {
    Matrix m;
    const Index k = state.range(0);
    const Rotation rotation({m.values.data(), k, k, k});
    for (auto _ : state) rotate_columns(m.in(), rotation, m.to(), 1);
    count_elements(state);
    state.counters["FLOP/s"] = benchmark::Counter(2.0 * rows * cols * static_cast<double>(k), benchmark::Counter::kIsIterationInvariantRate);
}

void largest_magnitude(benchmark::State& state) {
    const Matrix m;
    for (auto _ : state) benchmark::DoNotOptimize(amax(m.in(), 1));
    count_elements(state);
}

void round_values(benchmark::State& state, const std::string& format) {
    Matrix m;
    const float g = divisor(format, m);
    for (auto _ : state) round_to_grid(format, {}, m.in(), g, m.to(), 1);
    count_elements(state);
}

void encode_e2m1(benchmark::State& state) {
    const Matrix m;
    std::vector<std::uint8_t> codes(rows * cols);
    for (auto _ : state) {
        for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = e2m1::encode(m.values[i]);
        benchmark::DoNotOptimize(codes.data());
    }
    count_elements(state);
}

void pack_codes(benchmark::State& state) {
    Matrix m;
    const std::vector<std::uint8_t> codes(rows * cols, 3);
    for (auto _ : state) {
        for (Index r = 0; r < rows; ++r) pack_row(codes.data() + r * cols, cols, m.packed().row(r));
        benchmark::DoNotOptimize(m.codes.data());
    }
    count_elements(state);
}

void hessian_panel(benchmark::State& state) {
    constexpr Index width = 512, tokens = 256;
    const std::vector<float> x(width * tokens, 0.5f);
    Hessian hessian(width);
    for (auto _ : state) hessian.update({x.data(), tokens, width, width}, 1);
    state.counters["FLOP/s"] = benchmark::Counter(static_cast<double>(tokens) * width * (width + 1), benchmark::Counter::kIsIterationInvariantRate);
}

void rotate_and_quantize(benchmark::State& state, const std::string& format) {
    Matrix m;
    const float g = divisor(format, m);
    for (auto _ : state) quantize(format, {}, m.in(), g, m.packed(), m.scale_view(format), 1, state.range(0));
    count_elements(state);
}

// The kernel alone: 128 terms a chain, both factors in the first cache.
template <class Real>
void register_tile(benchmark::State& state) {
    const std::vector<Real> a(kernel_rows<Real> * product_depth, Real(0.5)), b(kernel_cols * product_depth, Real(0.25));
    std::vector<Real> c(kernel_rows<Real> * kernel_cols);
    for (auto _ : state) {
        multiply_tile<Real, false>(product_depth, a.data(), kernel_rows<Real>, b.data(), kernel_cols, c.data(), kernel_rows<Real>);
        benchmark::DoNotOptimize(c.data());
        benchmark::ClobberMemory();
    }
    state.counters["FLOP/s"] = benchmark::Counter(2.0 * kernel_rows<Real> * kernel_cols * product_depth, benchmark::Counter::kIsIterationInvariantRate);
}

template <class Real>
void cholesky(benchmark::State& state) {
    const Index n = state.range(0), stride = n + 8;
    std::vector<double> moment(static_cast<std::size_t>(n * stride), 0.5), columns(moment.size());
    for (Index c = 0; c < n; ++c) moment[static_cast<std::size_t>(c * (stride + 1))] = 1.5;
    for (auto _ : state) {
        state.PauseTiming();
        columns = moment;
        state.ResumeTiming();
        if (!factorize<Real>(columns.data(), n, stride, 1)) state.SkipWithError("not factorised");
    }
    state.counters["FLOP/s"] = benchmark::Counter(static_cast<double>(n) * n * n / 3, benchmark::Counter::kIsIterationInvariantRate);
}

BENCHMARK(encode_e2m1);
BENCHMARK(pack_codes);
BENCHMARK_CAPTURE(find_scales_by, mxfp4_even, "mxfp4", ScaleSearch::absmax);
BENCHMARK_CAPTURE(find_scales_by, nvfp4_absmax, "nvfp4", ScaleSearch::absmax);
BENCHMARK_CAPTURE(find_scales_by, mxfp4_mse, "mxfp4", ScaleSearch::mse);
BENCHMARK_CAPTURE(find_scales_by, nvfp4_mse, "nvfp4", ScaleSearch::mse);
BENCHMARK_CAPTURE(find_scales_by, mxfp4_fpquant_mse, "mxfp4", ScaleSearch::fpquant_mse);
BENCHMARK_CAPTURE(find_scales_by, nvfp4_fpquant_mse, "nvfp4", ScaleSearch::fpquant_mse);
BENCHMARK(largest_magnitude);
BENCHMARK_CAPTURE(encode_codes, mxfp4, "mxfp4");
BENCHMARK_CAPTURE(encode_codes, nvfp4, "nvfp4");
BENCHMARK_CAPTURE(decode_codes, mxfp4, "mxfp4");
BENCHMARK_CAPTURE(decode_codes, nvfp4, "nvfp4");
BENCHMARK_CAPTURE(round_values, mxfp4, "mxfp4");
BENCHMARK_CAPTURE(round_values, nvfp4, "nvfp4");
BENCHMARK(dense_rotation)->Arg(16)->Arg(32)->Arg(128);
BENCHMARK(hadamard)->Arg(16)->Arg(32)->Arg(128);
BENCHMARK_CAPTURE(rotate_and_quantize, mxfp4, "mxfp4")->Arg(32)->Arg(128);
BENCHMARK_CAPTURE(rotate_and_quantize, nvfp4, "nvfp4")->Arg(16)->Arg(128);
BENCHMARK_TEMPLATE(register_tile, float);
BENCHMARK_TEMPLATE(register_tile, double);
BENCHMARK(hessian_panel);
BENCHMARK_TEMPLATE(cholesky, float)->Arg(256)->Arg(1024);
BENCHMARK_TEMPLATE(cholesky, double)->Arg(256)->Arg(1024);

}  // namespace
