// The widest vector of floats or doubles that this level multiplies, and the one operation on it that C++ has no operator for: the fused multiply-add.
//
// This room alone fuses: its sums decide codes, which are promised per level. Codecs and rotations promise the same bytes on every level and use none of it.
#pragma once

#include <array>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/matrix_view.h"

namespace mrgptq {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif

template <class Real>
struct VectorOf {
    typedef Real type __attribute__((vector_size(vector_bytes)));
};
template <class Real>
using Vector = typename VectorOf<Real>::type;

template <class Real>
inline constexpr Index vector_size = vector_bytes / static_cast<Index>(sizeof(Real));

template <class Real>
inline Vector<Real> load(const Real* from) noexcept {
    Vector<Real> v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

template <class Real>
inline void store(Real* to, Vector<Real> v) noexcept {
    std::memcpy(to, &v, sizeof(v));
}

template <class Real>
inline Vector<Real> splat(Real x) noexcept {
    return x - Vector<Real>{};
}

// The two halves of a vector of floats.
inline std::array<Vector<double>, 2> widened(Vector<float> v) noexcept {
    typedef float Half __attribute__((vector_size(vector_bytes / 2)));
    std::array<Half, 2> halves;
    std::memcpy(&halves, &v, sizeof(v));
    return {__builtin_convertvector(halves[0], Vector<double>), __builtin_convertvector(halves[1], Vector<double>)};
}

// a * b + c, rounded once where the level can (v2 cannot and rounds twice).
inline Vector<float> fused(Vector<float> a, Vector<float> b, Vector<float> c) noexcept {
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    for (int i = 0; i < vector_size<float>; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

inline Vector<double> fused(Vector<double> a, Vector<double> b, Vector<double> c) noexcept {
#if defined(__AVX512F__)
    return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    for (int i = 0; i < vector_size<double>; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

}  // namespace mrgptq
