// One extension module for each ISA level; MRGPTQ_MODULE and MRGPTQ_ISA come from CMake.
#include "base/parallel.h"
#include "bindings/arrays.h"

#define MRGPTQ_STRING_OF(x) #x
#define MRGPTQ_STRING(x) MRGPTQ_STRING_OF(x)

PYBIND11_MODULE(MRGPTQ_MODULE, module) {
    namespace py = pybind11;
    module.doc() = "Compiled core of mrgptq; use the functions of the package instead.";
    module.def("build_info", [] {
        py::dict info;
        info["isa"] = MRGPTQ_STRING(MRGPTQ_ISA);
        info["compiler"] = MRGPTQ_STRING(MRGPTQ_COMPILER);
#ifdef _OPENMP
        info["openmp"] = _OPENMP;
#else
        info["openmp"] = py::none();
#endif
        info["threads"] = mrgptq::default_threads();
        return info;
    });
    mrgptq::bindings::register_formats(module);
    mrgptq::bindings::register_codecs(module);
    mrgptq::bindings::register_rotations(module);
    mrgptq::bindings::register_gptq(module);
    mrgptq::bindings::register_matmul(module);
}
