// Numbers whose last byte is the last that may be read: the page behind it answers with a fault.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "matrices.h"

namespace mrgptq::testing {

class Guarded {
public:
    explicit Guarded(const Matrix<std::uint32_t>& from) : rows_(from.view().rows), cols_(from.view().cols) {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<std::size_t>(rows_ * cols_) * sizeof(std::uint32_t);
        size_ = (bytes + page - 1) / page * page + page;
        memory_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory_ == MAP_FAILED) throw std::bad_alloc();
        auto* const guard = static_cast<std::byte*>(memory_) + size_ - page;
        data_ = reinterpret_cast<std::uint32_t*>(guard - bytes);
        for (Index r = 0; r < rows_; ++r) std::memcpy(data_ + r * cols_, from.view().row(r), static_cast<std::size_t>(cols_) * sizeof(std::uint32_t));
        mprotect(guard, page, PROT_NONE);
    }
    ~Guarded() { munmap(memory_, size_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    MatrixView<const std::uint32_t> view() const noexcept { return {data_, rows_, cols_, cols_}; }

private:
    Index rows_, cols_;
    std::size_t size_;
    void* memory_;
    std::uint32_t* data_;
};

}  // namespace mrgptq::testing
#endif
