// What this processor can do at best, in the instructions that the kernels are made of: the ceilings
// that `perf.kernels` prints beside every kernel (the roofline model, Williams et al., CACM 2009).
#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

constexpr int kRounds = 1 << 16;
constexpr int kChains = kWide ? 16 : 4;  // independent sums, enough to hide the latency

// Keep the compiler from seeing that all results are the same.
template <class V>
inline void opaque(V& value) {
  __asm__ volatile("" : "+m"(value));
}
#if defined(RYZANSTEIN_AVX512) || defined(RYZANSTEIN_AVXVNNI)
inline void fresh(Bytes&) {}  // one instruction: nothing in it can be taken out of the loop
#else
inline void fresh(Bytes& x) { __asm__ volatile("" : "+x"(x.a), "+x"(x.b)); }
#endif

// Runs `product` on every chain's sum, again and again; each is `operations` a lane.
template <class Sum, class Product>
int64_t run_chains(Sum start, int64_t operations, const Product& product) {
  Sum sum[kChains];
  UNROLL for (int i = 0; i < kChains; ++i) {
    Sum first = start;
    opaque(first);
    sum[i] = first;
  }
  for (int n = 0; n < kRounds; ++n) {
    UNROLL for (int i = 0; i < kChains; ++i) sum[i] = product(sum[i]);
  }
  // Copies: what is opaque lies in memory, and the sums have to stay in registers.
  UNROLL for (int i = 0; i < kChains; ++i) {
    Sum last = sum[i];
    opaque(last);
  }
  return int64_t{kRounds} * kChains * 16 * operations;
}

int64_t int8_dots() {
  Bytes weights = set1_int(0x01020304), x = set1_int(0x04030201);
  opaque(weights);
  opaque(x);
  return run_chains(no_products(), 4 * 2, [&](Partial sum) {
    fresh(x);
    return dot_partial(sum, weights, x);
  });
}

int64_t bf16_dots() {
  alignas(64) const uint16_t ones[32] = {0x3f80, 0x3f80};
  Pairs a = load_pairs(ones), b = a;
  opaque(a);
  opaque(b);
  return run_chains(zero(), 2 * 2, [&](Floats sum) { return dot_pairs(sum, a, b); });
}

int64_t float_products() {
  Floats a = set1(0.5f), b = a;
  opaque(a);
  opaque(b);
  return run_chains(zero(), 2, [&](Floats sum) { return fma(a, b, sum); });
}

int64_t read(const uint8_t* memory, int64_t bytes) {
  Ints sum[4];
  for (Ints& s : sum) s = set1_int(0);
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = add(sum[j], load_bytes(memory + i + 64 * j));
  }
  for (Ints& s : sum) opaque(s);
  return bytes;
}

}  // namespace

int64_t probe(Probe kind, const uint8_t* memory, int64_t bytes) {
  switch (kind) {
    case Probe::kInt8Dot: return int8_dots();
    case Probe::kBf16Dot: return bf16_dots();
    case Probe::kFloat: return float_products();
    default: return read(memory, bytes);
  }
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
