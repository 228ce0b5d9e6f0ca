// Rows of floats as narrower numbers.
#pragma once

#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

// Rounds a row to int8 under one scale, which is returned; `out` has room for whole registers.
inline float round_to_int8(const float* x, int64_t count, int8_t* out, int32_t* sum) {
  Floats highest = zero();
  for (int64_t i = 0; i < count; i += 16) highest = max(highest, abs(load(x + i, count - i)));
  const float largest = max_lanes(highest);
  const bool nothing = largest < kSmallest;
  const Floats factor = set1(nothing ? 0.0f : 127.0f / largest);
  Ints total = set1_int(0);
  for (int64_t i = 0; i < count; i += 16) {
    const Ints rounded = to_ints(mul(load(x + i, count - i), factor));
    store_int8(out + i, rounded);
    total = add(total, rounded);
  }
  *sum = sum_lanes(total);
  return nothing ? 0.0f : largest / 127.0f;
}

inline void round_to_bf16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) store_bf16(out + i, load(x + i, count - i), count - i);
}

// A row as what pairs of the cache are multiplied with.
inline void store_pairs(const float* x, int64_t count, uint16_t* out) {
  round_to_bf16(x, count, out);
}
inline void store_pairs(const float* x, int64_t count, float* out) {
  std::memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
}

// A Walsh-Hadamard transform of `dim` values in place, in blocks of the largest power of two that
// divides it; its own inverse. It spreads outliers, so that few bits hold a vector better (QuaRot,
// arXiv 2404.00456), and leaves products of two vectors as they are.
inline void spread(float* x, int64_t dim) {
  const int64_t block = dim & -dim;
  float scale = 1.0f;
  for (int64_t n = block; n > 1; n /= 2) scale *= 0.70710678118654752f;
  for (int64_t half = 1; half < block; half *= 2) {
    for (int64_t first = 0; first < dim; first += 2 * half) {
      for (int64_t i = first; i < first + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
  for (int64_t i = 0; i < dim; ++i) x[i] *= scale;
}

}  // namespace
}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
