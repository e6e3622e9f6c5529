// Large pages for memory that is about to be filled for the first time.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mrgptq {

// Asks for them; the system may have none. By pages of 4 KiB, half of the time that a matrix takes to fill goes into its faults.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t page = 65536;  // what is advised begins at one; no system's are larger
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page, end = reinterpret_cast<std::uintptr_t>(data) + bytes;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace mrgptq
