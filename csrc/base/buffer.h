// Memory for numbers that are about to be written for the first time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "base/matrix_view.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mrgptq {

constexpr std::size_t cache_line = 64;  // bytes; no vector is wider

// Begins with a cache line, so that no vector straddles two; nothing is in it yet.
template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(Index size) : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), std::align_val_t{cache_line}))) {
        prefer_large_pages(static_cast<std::size_t>(size) * sizeof(T));
    }
    T* data() const noexcept { return data_.get(); }

private:
    struct Release {
        void operator()(T* data) const noexcept { ::operator delete(data, std::align_val_t{cache_line}); }
    };

    // Asks for them; the system may have none. By pages of 4 KiB, half of the time that a matrix takes to fill goes into its faults.
    void prefer_large_pages([[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        constexpr std::uintptr_t page = 65536;  // what is advised begins at one; no system's are larger
        constexpr std::size_t large_page = 2 << 20;
        if (bytes < large_page) return;
        const auto address = reinterpret_cast<std::uintptr_t>(data_.get()), begin = (address + page - 1) / page * page, end = address + bytes;
        if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    }

    std::unique_ptr<T[], Release> data_;
};

}  // namespace mrgptq
