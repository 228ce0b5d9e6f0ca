// Sixteen float lanes, sixteen int32 lanes and their products of bytes and of bfloat16: the terms in
// which kernels are written once and compiled for every instruction set.
//
// RYZANSTEIN_ISA names the set and is the namespace of everything compiled for it. Files that
// include this may use no function of the standard library that the linker could share with files
// for older processors: no containers, no algorithms on their types.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#if defined(RYZANSTEIN_EMULATE)
#include <array>
#endif

// In front of loops over a pass's rows and tiles: GCC unrolls them early then, and keeps their arrays in
// registers. Otherwise it stores every sum after every product.
#define UNROLL _Pragma("GCC unroll 16")

namespace ryzanstein {
namespace RYZANSTEIN_ISA {

#if defined(RYZANSTEIN_AVX512)
#if defined(RYZANSTEIN_EMULATE)
#include "simd_emulated.h"
#endif
#include "simd_avx512.h"
constexpr bool kWide = true;  // 32 registers of 16 lanes
#else
#include "simd_avx2.h"
constexpr bool kWide = false;  // 16 of 8
#endif

#if defined(RYZANSTEIN_AVX512) || defined(RYZANSTEIN_AVXVNNI)
// Sums of small bytes' products before they are as wide as an int: see simd_avx2.h. Where a product is one
// instruction they always are.
using Partial = Ints;
constexpr int64_t kPartialDots = int64_t{1} << 40;
inline Partial no_products() { return set1_int(0); }
inline Partial dot_partial(Partial sum, Bytes small, Bytes x) { return dot_small(sum, small, x); }
inline Ints widen(Partial sum) { return sum; }
// A sum of them that begins at a number.
inline Partial products_from(const int32_t* start) { return set1_int(*start); }
inline Ints products_of(Partial sum, const int32_t*) { return sum; }
#endif

// A pointer as of now: else GCC keeps one for every member that a loop reads, more than there are registers.
template <class T>
inline T* now(T* p) {
  __asm__("" : "+r"(p));
  return p;
}

inline Pairs load_pairs(const void* p) { return as_pairs(load_bytes(p)); }

// e^x: 2^n times a polynomial on the remainder (Cephes' coefficients), below 2 ulp.
inline Floats exp(Floats x) {
  x = max(min(x, set1(88.0f)), set1(-104.0f));
  const Floats n = round(mul(x, set1(1.44269504f)));
  // ln 2 in two parts, so that the remainder is exact.
  Floats r = fnma(n, set1(0.693359375f), x);
  r = fnma(n, set1(-2.12194440e-4f), r);
  Floats p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale_by_power(p, n);
}

inline Floats sigmoid(Floats x) {
  const Floats one = set1(1.0f);
  return div(one, add(one, exp(sub(zero(), x))));
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
