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

}  // namespace
}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
