// Choosing a token from one row of logits. The draw walks down the kept tokens, best first, without
// sorting the vocabulary: only tokens above a cutoff are sorted, and the cutoff is lowered until they
// hold everything that the filters keep or the draw reaches.
#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "vector_math.h"

namespace ryzanstein {
namespace {

// Cutoffs relative to the likeliest token; most draws end above the first.
constexpr float kFirstCutoff = 3e-3f;
constexpr float kCutoffStep = 1.0f / 64.0f;
constexpr float kLastCutoff = 1e-12f;

struct Candidate {
  float weight;
  int32_t id;
};

inline __mmask16 tail(int64_t left) {
  return left >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << left) - 1);
}

float largest(const float* logits, int64_t vocab) {
  __m512 best = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < vocab; i += 16) {
    const __mmask16 mask = tail(vocab - i);
    best = _mm512_mask_max_ps(best, mask, best, _mm512_maskz_loadu_ps(mask, logits + i));
  }
  return _mm512_reduce_max_ps(best);
}

// weights = exp((logits - largest) / temperature); returns their sum.
float weigh(const float* logits, int64_t vocab, float temperature, float* weights) {
  const __m512 top = _mm512_set1_ps(largest(logits, vocab));
  const __m512 inverse = _mm512_set1_ps(1.0f / temperature);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < vocab; i += 16) {
    const __mmask16 mask = tail(vocab - i);
    const __m512 logit = _mm512_maskz_loadu_ps(mask, logits + i);
    const __m512 scaled = _mm512_mul_ps(_mm512_sub_ps(logit, top), inverse);
    // Forbidden tokens are -inf, which exp512 would clamp to something above zero.
    const __mmask16 possible = _mm512_mask_cmp_ps_mask(mask, scaled, _mm512_set1_ps(-100.0f),
                                                       _CMP_GT_OQ);
    const __m512 weight = _mm512_maskz_mov_ps(possible, exp512(scaled));
    _mm512_mask_storeu_ps(weights + i, mask, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

void collect(const float* weights, int64_t vocab, float cutoff, std::vector<Candidate>* found) {
  found->clear();
  const __m512 bound = _mm512_set1_ps(cutoff);
  for (int64_t i = 0; i < vocab; i += 16) {
    const __mmask16 mask = tail(vocab - i);
    const __m512 weight = _mm512_maskz_loadu_ps(mask, weights + i);
    uint32_t above = _mm512_mask_cmp_ps_mask(mask, weight, bound, _CMP_GE_OQ);
    for (; above != 0; above &= above - 1) {
      const int64_t at = i + __builtin_ctz(above);
      if (weights[at] > 0.0f) found->push_back({weights[at], static_cast<int32_t>(at)});
    }
  }
}

// Whether the candidates above `cutoff` hold all that the filters keep, or that the draw reaches.
bool enough(const std::vector<Candidate>& found, float cutoff, double sum, const Filters& f) {
  if (cutoff <= 0.0f) return true;
  if (f.min_p > 0.0f && cutoff > f.min_p) return false;
  if (f.top_k > 0) return static_cast<int64_t>(found.size()) >= f.top_k;
  if (f.min_p > 0.0f) return true;
  double mass = 0.0;
  for (const Candidate& c : found) mass += c.weight;
  return mass > sum * (f.top_p < 1.0f ? f.top_p : f.uniform);
}

}  // namespace

int64_t argmax(const float* logits, int64_t vocab) {
  const float best = largest(logits, vocab);
  const __m512 wanted = _mm512_set1_ps(best);
  for (int64_t i = 0; i < vocab; i += 16) {
    const __mmask16 mask = tail(vocab - i);
    const uint32_t equal = _mm512_mask_cmp_ps_mask(
        mask, _mm512_maskz_loadu_ps(mask, logits + i), wanted, _CMP_EQ_OQ);
    if (equal != 0) return i + __builtin_ctz(equal);
  }
  return 0;
}

int64_t draw(const float* logits, int64_t vocab, const Filters& f) {
  static thread_local std::vector<float> weights;
  static thread_local std::vector<Candidate> found;
  if (static_cast<int64_t>(weights.size()) < vocab) weights.resize(static_cast<size_t>(vocab));
  const double sum = weigh(logits, vocab, f.temperature, weights.data());
  for (float cutoff = kFirstCutoff;; cutoff *= kCutoffStep) {
    if (cutoff < kLastCutoff) cutoff = 0.0f;
    collect(weights.data(), vocab, cutoff, &found);
    if (enough(found, cutoff, sum, f)) break;
  }
  std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
  });
  size_t kept = found.size();
  if (f.top_k > 0) kept = std::min<size_t>(kept, static_cast<size_t>(f.top_k));
  if (f.min_p > 0.0f) {
    while (kept > 1 && found[kept - 1].weight < f.min_p) --kept;
  }
  double total = sum;
  if (f.top_k > 0 || f.min_p > 0.0f) {
    total = 0.0;
    for (size_t i = 0; i < kept; ++i) total += found[i].weight;
  }
  if (f.top_p < 1.0f) {
    double mass = 0.0;
    size_t i = 0;
    while (i < kept && mass < f.top_p * total) mass += found[i++].weight;
    kept = std::max<size_t>(i, 1);
    total = mass;
  }
  const double target = f.uniform * total;
  double mass = 0.0;
  for (size_t i = 0; i < kept; ++i) {
    mass += found[i].weight;
    if (mass > target) return found[i].id;
  }
  return kept > 0 ? found[kept - 1].id : argmax(logits, vocab);
}

}  // namespace ryzanstein
