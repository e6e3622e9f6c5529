// What a fuzzer's bytes mean: choices first, then numbers; where they end, chance goes on that is seeded by them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../matrices.h"
#include "formats/block_format.h"

namespace mrgptq::fuzz {

using testing::Layout, testing::Matrix;

// In place of an exception, which the code under test might catch.
inline void require(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::abort();
}

class Input {
public:
    Input(const std::uint8_t* data, std::size_t size) : data_(data), end_(data + size) {
        for (std::size_t i = 0; i < size; ++i) chance_ = (chance_ ^ data[i]) * 0x100000001B3u;
    }

    std::uint8_t byte() noexcept {
        if (data_ != end_) return *data_++;
        return static_cast<std::uint8_t>(more() >> 56);
    }

    // From `least` to `most`, both included.
    Index number(Index least, Index most) noexcept { return least + (byte() | byte() << 8) % (most - least + 1); }

    template <class T>
    T one_of(std::initializer_list<T> values) noexcept {
        return values.begin()[byte() % values.size()];
    }

    float any_float() noexcept {
        if (end_ - data_ < 4) return std::bit_cast<float>(static_cast<std::uint32_t>(more() >> 32));
        float value;
        std::memcpy(&value, data_, 4);
        data_ += 4;
        return value;
    }

    // Of any size, or about as large as each other, since bits by chance leave one number of a group that hides the others; `finite` or not.
    void fill(Matrix<float>& x, bool finite) noexcept {
        const bool alike = byte() % 2;
        const float unit = std::ldexp(1.0f, static_cast<int>(byte()) - 150);
        each(x, [&](float& value) {
            value = alike ? static_cast<float>(static_cast<std::int16_t>(byte() | byte() << 8)) * unit : any_float();
            if (finite && !std::isfinite(value)) value = static_cast<float>(byte());
        });
        if (alike && !finite && byte() % 4 == 0) x(number(0, x.view().rows - 1), number(0, x.view().cols - 1)) = any_float();
    }

    void fill(Matrix<std::uint8_t>& x) noexcept {
        each(x, [&](std::uint8_t& value) { value = byte(); });
    }

    // Bytes that lie near each other, as scales do, or any.
    void fill_scales(Matrix<std::uint8_t>& x) noexcept {
        const unsigned least = byte(), kinds = one_of<unsigned>({1, 4, 16, 256});
        each(x, [&](std::uint8_t& value) { value = static_cast<std::uint8_t>(least + byte() % kinds); });
    }

    Layout layout() noexcept { return {one_of<Index>({0, 0, 0, 7}), byte() % 4 == 0}; }
    int threads() noexcept { return byte() % 64 == 0 ? 3 : 1; }

    // A divisor as the package lets it through: positive and finite.
    float divisor(std::string_view format) noexcept {
        const float any = std::fabs(any_float());
        switch (byte() % 3) {
            case 0: return std::isfinite(any) && any > 0 ? any : 1.0f;
            case 1: return format == Mxfp4::name ? 3.0f : 2688.0f / static_cast<float>(1 + byte());
            default: return 1.0f;
        }
    }

private:
    template <class T, class F>
    static void each(Matrix<T>& x, F&& f) noexcept {
        const MatrixView<T> view = x.view();
        for (Index r = 0; r < view.rows; ++r)
            for (T *value = view.row(r), *end = value + view.cols; value != end; ++value) f(*value);
    }

    std::uint64_t more() noexcept { return chance_ = chance_ * 6364136223846793005u + 1442695040888963407u; }  // Knuth's, whose upper bits are good

    const std::uint8_t *data_, *end_;
    std::uint64_t chance_ = 0xCBF29CE484222325u;
};

// Bit for bit, but for the payload of a NaN.
inline bool same(float a, float b) noexcept { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (std::isnan(a) && std::isnan(b)); }

inline bool same(const Matrix<float>& a, const Matrix<float>& b) noexcept {
    for (Index r = 0; r < a.view().rows; ++r)
        for (Index c = 0; c < a.view().cols; ++c)
            if (!same(a(r, c), b(r, c))) return false;
    return true;
}

}  // namespace mrgptq::fuzz
