// The instruction-set levels that this processor runs, lowest first: asked when the package is imported, and by CMake for "native" and for the tests that it may run here.
//
// Levels as the x86-64 psABI names them; what the ABI lists beside these features no processor has without them. v4_vnni is ours: v4 with the dot products of bytes that products with 8-bit
// activations need. Include this only in code built for the baseline.
#pragma once

#include <string>
#include <vector>

namespace mrgptq {

inline std::vector<std::string> supported_isa_levels() {
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
    if (v4 && __builtin_cpu_supports("avx512vnni")) levels.push_back("v4_vnni");
    return levels;
#else
    return {"generic"};
#endif
}

}  // namespace mrgptq
