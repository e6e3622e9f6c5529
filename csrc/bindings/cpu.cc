// The levels this machine runs, for _core.py, which must know before any code of a level is loaded; built for the baseline, so it runs everywhere.
#include <pybind11/pybind11.h>

#include "base/isa_levels.h"

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Which of the compiled cores this machine can run.";
    module.def("supported_levels", [] {
        pybind11::list levels;
        for (const auto& level : mrgptq::supported_isa_levels()) levels.append(level);
        return levels;
    });
}
