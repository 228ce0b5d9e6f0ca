// Choosing a token from one row of logits. The draw walks down the kept tokens, best first, without
// sorting the vocabulary: only tokens above a cutoff are sorted, and the cutoff is lowered until they
// hold everything that the filters keep or the draw reaches.
#include <algorithm>
#include <limits>

#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

// Cutoffs relative to the likeliest token; most draws end above the first.
constexpr float kFirstCutoff = 3e-3f;
constexpr float kCutoffStep = 1.0f / 64.0f;
constexpr float kLastCutoff = 1e-12f;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Candidate {
  float weight;
  int32_t id;
};
static_assert(sizeof(Candidate) + sizeof(float) == kDrawBytes, "the scratch holds both");

// Lanes behind the end are -infinity.
Floats load_logits(const float* logits, int64_t left) {
  if (left >= 16) return load(logits);
  alignas(64) float lanes[16];
  store(lanes, set1(kLowest));
  std::memcpy(lanes, logits, static_cast<size_t>(left) * sizeof(float));
  return load(lanes);
}

float largest(const float* logits, int64_t vocab) {
  Floats best = set1(kLowest);
  for (int64_t i = 0; i < vocab; i += 16) best = max(best, load_logits(logits + i, vocab - i));
  return max_lanes(best);
}

// weights = exp((logits - largest) / temperature); returns their sum.
float weigh(const float* logits, int64_t vocab, float temperature, float* weights) {
  const Floats top = set1(largest(logits, vocab)), inverse = set1(1.0f / temperature);
  Floats sum = zero();
  for (int64_t i = 0; i < vocab; i += 16) {
    const Floats scaled = mul(sub(load_logits(logits + i, vocab - i), top), inverse);
    // Forbidden tokens are -inf, which exp would clamp to something above zero.
    const Floats weight = keep(greater(scaled, set1(-100.0f)), exp(scaled));
    store(weights + i, weight, vocab - i);
    sum = add(sum, weight);
  }
  return sum_lanes(sum);
}

// Tokens of at least `cutoff`; returns how many.
int64_t collect(const float* weights, int64_t vocab, float cutoff, Candidate* found) {
  int64_t count = 0;
  const Floats bound = set1(cutoff);
  for (int64_t i = 0; i < vocab; i += 16) {
    uint32_t above = bits(at_least(load(weights + i, vocab - i), bound));
    for (; above != 0; above &= above - 1) {
      const int64_t at = i + __builtin_ctz(above);
      if (at < vocab && weights[at] > 0.0f) found[count++] = {weights[at], static_cast<int32_t>(at)};
    }
  }
  return count;
}

// Whether the candidates above `cutoff` hold all that the filters keep, or that the draw reaches.
bool enough(const Candidate* found, int64_t count, float cutoff, double sum, const Filters& f) {
  if (cutoff <= 0.0f) return true;
  if (f.min_p > 0.0f && cutoff > f.min_p) return false;
  if (f.top_k > 0) return count >= f.top_k;
  if (f.min_p > 0.0f) return true;
  double mass = 0.0;
  for (int64_t i = 0; i < count; ++i) mass += found[i].weight;
  return mass > sum * (f.top_p < 1.0f ? f.top_p : f.uniform);
}

}  // namespace

void penalize(float* logits, int64_t vocab, const Penalty& p) {
  for (int64_t i = 0; i < vocab; ++i) {
    float x = logits[i];
    if (p.seen[i]) x = x > 0.0f ? x / p.repetition : x * p.repetition;
    x -= static_cast<float>(p.counts[i]) * p.frequency;
    if (p.counts[i] > 0) x -= p.presence;
    logits[i] = x;
  }
}

int64_t argmax(const float* logits, int64_t vocab) {
  const Floats wanted = set1(largest(logits, vocab));
  for (int64_t i = 0; i < vocab; i += 16) {
    const uint32_t same = bits(equal(load_logits(logits + i, vocab - i), wanted));
    if (same != 0) return least(i + __builtin_ctz(same), vocab - 1);
  }
  return 0;
}

int64_t draw(const float* logits, int64_t vocab, const Filters& f, uint8_t* scratch) {
  auto* found = reinterpret_cast<Candidate*>(scratch);
  auto* weights = reinterpret_cast<float*>(scratch + vocab * sizeof(Candidate));
  const double sum = weigh(logits, vocab, f.temperature, weights);
  int64_t kept;
  for (float cutoff = kFirstCutoff;; cutoff *= kCutoffStep) {
    if (cutoff < kLastCutoff) cutoff = 0.0f;
    kept = collect(weights, vocab, cutoff, found);
    if (enough(found, kept, cutoff, sum, f)) break;
  }
  std::sort(found, found + kept, [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
  });
  if (f.top_k > 0) kept = least(kept, f.top_k);
  if (f.min_p > 0.0f) {
    while (kept > 1 && found[kept - 1].weight < f.min_p) --kept;
  }
  double total = sum;
  if (f.top_k > 0 || f.min_p > 0.0f) {
    total = 0.0;
    for (int64_t i = 0; i < kept; ++i) total += found[i].weight;
  }
  if (f.top_p < 1.0f) {
    double mass = 0.0;
    int64_t i = 0;
    while (i < kept && mass < f.top_p * total) mass += found[i++].weight;
    kept = most(i, 1);
    total = mass;
  }
  const double target = f.uniform * total;
  double mass = 0.0;
  for (int64_t i = 0; i < kept; ++i) {
    mass += found[i].weight;
    if (mass > target) return found[i].id;
  }
  return kept > 0 ? found[kept - 1].id : argmax(logits, vocab);
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
