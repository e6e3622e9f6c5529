// The machine's bounds beside the kernels, on one and on two threads; bench/bounds.py measures the same functions beside the Python contenders.
#include <benchmark/benchmark.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "bounds.h"

namespace {

// Four times the last-level cache, as bench/bounds.py has it, and 256 MiB at least.
const std::int64_t count = std::max<std::int64_t>(64 << 20, sysconf(_SC_LEVEL3_CACHE_SIZE));

void copy(benchmark::State& state) {
    const std::vector<float> from(count, 1.0f);
    std::vector<float> to(count);
    for (auto _ : state) bound_copy(to.data(), from.data(), count, static_cast<int>(state.range(0)));
    state.SetBytesProcessed(state.iterations() * 2 * count * 4);
}

void scale_in_place(benchmark::State& state) {
    std::vector<float> x(count, 1.0f);
    for (auto _ : state) bound_scale(x.data(), count, 1.0f, static_cast<int>(state.range(0)));
    state.SetBytesProcessed(state.iterations() * 2 * count * 4);
}

void read(benchmark::State& state) {
    const std::vector<float> x(count, 1.0f);
    for (auto _ : state) benchmark::DoNotOptimize(bound_sum(x.data(), count, static_cast<int>(state.range(0))));
    state.SetBytesProcessed(state.iterations() * count * 4);
}

template <double (*chains)(std::int64_t, int)>
void multiply_add(benchmark::State& state) {
    double operations = 0;
    for (auto _ : state) operations += chains(1'000'000, static_cast<int>(state.range(0)));
    state.counters["FLOP/s"] = benchmark::Counter(operations, benchmark::Counter::kIsRate);
}

// Wall time: the work is that of several threads.
BENCHMARK(copy)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK(scale_in_place)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK(read)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK(multiply_add<bound_fma_float>)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK(multiply_add<bound_fma_double>)->Arg(1)->Arg(2)->UseRealTime();

}  // namespace
