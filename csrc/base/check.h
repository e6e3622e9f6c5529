// The one way the core refuses: std::invalid_argument, which Python sees as ValueError. Checks stand at the door of a public function; kernels trust.
#pragma once

#include <stdexcept>
#include <string>

namespace mrgptq {

inline void check(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

}  // namespace mrgptq
