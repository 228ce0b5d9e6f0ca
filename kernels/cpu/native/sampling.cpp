// Choosing a token from one row of logits. The draw counts down the kept tokens, best first, without
// sorting them: only tokens above a cutoff are looked at, and the cutoff is lowered until they hold
// everything that the filters keep or the draw reaches; among them a selection by mass finds the
// place (quickselect, Hoare 1961).
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

bool better(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

struct Prefix {
  int64_t count;
  double mass;
};

// Reorders the candidates so that the best `count` come first, the last of them in its place, where
// `count` is the least whose mass is enough; all of them if there is none.
template <class Enough>
Prefix best_with(Candidate* found, int64_t count, const Enough& enough) {
  constexpr int64_t kSorted = 32;
  int64_t low = 0, high = count;
  double before = 0.0;  // the mass of [0, low)
  while (high - low > kSorted) {
    Candidate sample[3] = {found[low], found[low + (high - low) / 2], found[high - 1]};
    std::sort(sample, sample + 3, better);
    const Candidate pivot = sample[1];  // one of the three is worse, so both sides get something
    const Candidate* middle = std::partition(
        found + low, found + high, [&](const Candidate& c) { return !better(pivot, c); });
    double mass = 0.0;
    for (const Candidate* c = found + low; c != middle; ++c) mass += c->weight;
    if (enough(before + mass)) {
      high = middle - found;
    } else {
      before += mass;
      low = middle - found;
    }
  }
  std::sort(found + low, found + high, better);
  for (int64_t i = low; i < high; ++i) {
    before += found[i].weight;
    if (enough(before)) return {i + 1, before};
  }
  return {high, before};
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

void forbid(const uint32_t* mask, const float* x, int64_t vocab, float* out) {
  const Floats never = set1(kLowest);
  for (int64_t i = 0; i < vocab; i += 16) {
    const Mask allowed = lanes_of(mask[i / 32] >> (i % 32));
    store(out + i, choose(allowed, load(x + i, vocab - i), never), vocab - i);
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
  if (kept == 0) return argmax(logits, vocab);
  if (f.top_k > 0 && kept > f.top_k) {
    std::nth_element(found, found + f.top_k - 1, found + kept, better);
    kept = f.top_k;
  }
  if (f.min_p > 0.0f) {
    // The likeliest token weighs 1.
    kept = std::partition(found, found + kept,
                          [&](const Candidate& c) { return c.weight >= f.min_p; }) - found;
  }
  double total = sum;
  if (f.top_k > 0 || f.min_p > 0.0f) {
    total = 0.0;
    for (int64_t i = 0; i < kept; ++i) total += found[i].weight;
  }
  if (f.top_p < 1.0f) {
    const double wanted = f.top_p * total;
    const Prefix nucleus = best_with(found, kept, [&](double mass) { return mass >= wanted; });
    kept = nucleus.count;
    total = nucleus.mass;
  }
  const double target = f.uniform * total;
  const Prefix drawn = best_with(found, kept, [&](double mass) { return mass > target; });
  return found[drawn.count - 1].id;
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
