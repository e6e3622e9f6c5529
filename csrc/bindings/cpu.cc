// The highest instruction-set level this machine runs, asked before any code of that level is loaded; built for the baseline, so it runs everywhere.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace {

// Levels as the x86-64 psABI names them, lowest first; what the ABI lists beside these features no processor has without them.
std::vector<std::string> supported_levels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    std::vector<std::string> levels;
    const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v2) levels.push_back("v2");
    if (v3) levels.push_back("v3");
    if (v4) levels.push_back("v4");
    return levels;
#else
    return {"generic"};
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Which of the compiled cores this machine can run.";
    module.def("supported_levels", [] {
        pybind11::list levels;
        for (const auto& level : supported_levels()) levels.append(level);
        return levels;
    });
}
