// A block format as a type: the group size and how a group's scale is stored. A new format is a new struct here, a line in with_format() and a line in the tests' list.
//
// The value of a code is  step * e2m1(code)  with  step = fl32(decode(scale) / tensor_scale).  `tensor_scale` is a divisor, as compressed-tensors and fp_quant keep it on disk: 1 for
// plain MXFP4, 3 for MXFP4 by the four-thirds rule, 2688 / amax for NVFP4.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/matrix_view.h"
#include "formats/e2m1.h"
#include "formats/e4m3.h"
#include "formats/e8m0.h"

namespace mrgptq {

struct Mxfp4 {
    static constexpr std::string_view name = "mxfp4";
    static constexpr Index group_size = 32;
    static constexpr float decode_scale(std::uint8_t bits) noexcept { return e8m0::decode(bits); }
};

struct Nvfp4 {
    static constexpr std::string_view name = "nvfp4";
    static constexpr Index group_size = 16;
    // The largest group's scale lands on 448 when amax(tensor) * tensor_scale = 6 * 448.
    static constexpr float tensor_scale_numerator = e2m1::largest * e4m3::largest;
    static constexpr float decode_scale(std::uint8_t bits) noexcept { return e4m3::decode(bits); }
};

// Calls f(Format{}) for the format of that name: the only switch over formats in the core.
template <class F>
decltype(auto) with_format(std::string_view name, F&& f) {
    if (name == Mxfp4::name) return std::forward<F>(f)(Mxfp4{});
    check(name == Nvfp4::name, "unknown format \"" + std::string(name) + "\"; known: mxfp4, nvfp4");
    return std::forward<F>(f)(Nvfp4{});
}

template <class Format>
constexpr float group_step(std::uint8_t scale, float tensor_scale) noexcept {
    return Format::decode_scale(scale) / tensor_scale;
}

}  // namespace mrgptq
