// The gated delta rule (arXiv 2412.06464) for one head of one sequence, token by token: whatever pieces a
// prompt comes in, a column's sums run in one order.
#include <cmath>

#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

// Some columns of the memory, a tile of `kCount` sixteens: it stays in the first cache, and their sums in
// registers.
template <int kCount>
void remember(const DeltaRun& run, int64_t column) {
  constexpr int64_t stride = 16 * kCount;
  const int64_t rows = run.key_dim, size = rows * stride;
  float* memory = run.memory + column * rows;
  const auto keep = [&] {
    float* kept = run.kept_memory + column * rows;
    for (int64_t i = 0; i < size; i += 16) store(kept + i, load(memory + i));
  };
  for (int64_t t = 0; t < run.tokens; ++t) {
    if (t == run.kept) keep();
    const float *query = run.queries + t * run.stride, *key = run.keys + t * run.stride;
    const float *value = run.values + t * run.stride + column, *gates = run.gates + t * run.gate_stride;
    const Floats decay = set1(gates[0]), share = set1(gates[run.share_at]);
    Floats found[2][kCount], change[kCount], out[kCount];
    UNROLL for (int b = 0; b < kCount; ++b) found[0][b] = found[1][b] = out[b] = zero();
    for (int64_t i = 0; i < rows; i += 2) {
      UNROLL for (int half = 0; half < 2; ++half) {
        const Floats k = set1(key[i + half]);
        const float* row = memory + (i + half) * stride;
        UNROLL for (int b = 0; b < kCount; ++b) {
          found[half][b] = fma(load(row + 16 * b), k, found[half][b]);
        }
      }
    }
    UNROLL for (int b = 0; b < kCount; ++b) {
      const Floats known = mul(add(found[0][b], found[1][b]), decay);
      change[b] = mul(sub(load(value + 16 * b), known), share);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Floats k = set1(key[i]), q = set1(query[i]);
      float* row = memory + i * stride;
      UNROLL for (int b = 0; b < kCount; ++b) {
        const Floats now = fma(k, change[b], mul(load(row + 16 * b), decay));
        store(row + 16 * b, now);
        out[b] = fma(now, q, out[b]);
      }
    }
    UNROLL for (int b = 0; b < kCount; ++b) {
      store(run.out + t * run.out_stride + column + 16 * b, out[b]);
    }
  }
  if (run.kept == run.tokens) keep();
}

}  // namespace

void delta_head(const DeltaRun& run) {
  const bool wide = run.value_dim % kDeltaTile == 0;
  const int64_t tile = wide ? kDeltaTile : 16;
  for (int64_t column = 0; column < run.value_dim; column += tile) {
    if (wide) {
      remember<kDeltaTile / 16>(run, column);
    } else {
      remember<1>(run, column);
    }
  }
}

void convolve_row(const float* const* inputs, const float* weights, int taps, int64_t width,
                  bool activated, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t left = width - i;
    Floats sum = zero();
    for (int t = 0; t < taps; ++t) {
      sum = fma(load(inputs[t] + i, left), load(weights + t * width + i, left), sum);
    }
    store(out + i, activated ? mul(sum, sigmoid(sum)) : sum, left);
  }
}

void multiply_row(const float* a, const float* b, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t left = width - i;
    store(out + i, mul(load(a + i, left), load(b + i, left)), left);
  }
}

void unit_row(float* x, int64_t dim, float scale) {
  Floats squares = zero();
  for (int64_t i = 0; i < dim; i += 16) {
    const Floats v = load(x + i);
    squares = fma(v, v, squares);
  }
  const Floats factor = set1(scale / std::sqrt(sum_lanes(squares) + kUnitEpsilon));
  for (int64_t i = 0; i < dim; i += 16) store(x + i, mul(load(x + i), factor));
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
