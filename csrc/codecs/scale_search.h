// The searches mse and fpquant_mse, fast: float32 estimates of every candidate's loss leave few candidates that could be the best, and only those are weighed as the definition does.
//
// The scale is the definition's bit for bit, because an estimate comes with a bound of its error (each bound's derivation: scale_search.cc) and whatever the bound cannot decide goes to the
// definition in scale_rule.cc. Where numbers are so large or so small that a bound would not hold, the whole group does.
#pragma once

#include "codecs/scale_rule.h"
#include "simd/vector.h"

namespace mrgptq {

// Stored scales of a chunk of groups (codecs/chunk.h) by "mse", as group_scale() finds them; `amax` are the bits of their largest magnitudes, finite.
template <class Format>
void least_error_scales(const float* x, simd::Words amax, const ScaleRule& rule, float tensor_scale, std::uint8_t* scales) noexcept;

// The same by "fpquant_mse".
template <class Format>
void shrunk_scales(const float* x, simd::Words amax, const ScaleRule& rule, float tensor_scale, std::uint8_t* scales) noexcept;

}  // namespace mrgptq
