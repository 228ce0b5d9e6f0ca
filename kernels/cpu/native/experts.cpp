// Mixture of experts: rows are sorted by expert, so that each expert's weights are read once for all of
// its rows. What a row comes to depends on no other row.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "program.h"

namespace ryzanstein {
namespace {

constexpr int64_t kPiecesAThread = 16;

// Which groups of experts none is chosen from: all but the best, by their two best together or, of a softmax, by
// their best; of equals the lower number stays. `worth` is room for a number a group; those that are lost are 0.
template <class Liked>
void weigh_groups(const ExpertSizes& sizes, const Liked& liked, std::vector<float>& worth) {
  const int64_t size = sizes.count / sizes.groups;
  worth.clear();
  for (int64_t g = 0; g < sizes.groups; ++g) {
    float best = -std::numeric_limits<float>::infinity(), second = best;
    for (int64_t n = g * size; n < (g + 1) * size; ++n) {
      const float value = liked(n);
      second = std::max(second, std::min(best, value));
      best = std::max(best, value);
    }
    worth.push_back(sizes.sigmoid ? best + second : best);
  }
  // The best of those that are left, marked as kept by what no group is worth.
  constexpr float kKept = std::numeric_limits<float>::infinity();
  for (int64_t k = 0; k < sizes.kept; ++k) {
    size_t best = worth.size();
    for (size_t g = 0; g < worth.size(); ++g) {
      if (worth[g] != kKept && (best == worth.size() || worth[g] > worth[best])) best = g;
    }
    worth[best] = kKept;
  }
  for (float& one : worth) one = one == kKept ? 1.0f : 0.0f;
}

// The experts of a row and their shares, the likeliest first and the lower number first of equals.
// `likely` is room for a row's probabilities.
void choose(const float* scores, const Experts& experts, float* likely, int32_t* chosen,
            float* shares) {
  const ExpertSizes& sizes = experts.sizes;
  const float* preference = experts.preference;
  const int64_t count = sizes.count, used = sizes.used;
  const float highest = *std::max_element(scores, scores + count);
  float total = 0.0f;
  for (int64_t n = 0; n < count; ++n) {
    likely[n] = sizes.sigmoid ? 1.0f / (1.0f + std::exp(-scores[n])) : std::exp(scores[n] - highest);
    total += likely[n];
  }
  // A softmax keeps the order of the scores, which tell apart what it rounds alike.
  const auto liked = [&](int64_t n) {
    if (!preference) return scores[n];
    return (sizes.sigmoid ? likely[n] : likely[n] / total) + preference[n];
  };
  static thread_local std::vector<float> groups;
  if (sizes.groups > 1) weigh_groups(sizes, liked, groups);
  int64_t kept = 0;
  for (int64_t n = 0; n < count; ++n) {
    if (sizes.groups > 1 && groups[static_cast<size_t>(n / (count / sizes.groups))] == 0.0f) continue;
    // Into its place among the best so far.
    int64_t place = kept;
    while (place > 0 && liked(chosen[place - 1]) < liked(n)) --place;
    if (place >= used) continue;
    kept = std::min(kept + 1, used);
    std::copy_backward(chosen + place, chosen + kept - 1, chosen + kept);
    chosen[place] = static_cast<int32_t>(n);
  }
  float sum = 0.0f;
  for (int64_t k = 0; k < used; ++k) {
    shares[k] = likely[chosen[k]];
    sum += shares[k];
  }
  const float whole = sizes.normalized ? std::max(sum, 1e-20f) : sizes.sigmoid ? 1.0f : total;
  for (int64_t k = 0; k < used; ++k) shares[k] = shares[k] / whole * sizes.scale;
  for (int64_t k = 0; experts.factors && k < used; ++k) shares[k] *= experts.factors[chosen[k]];
  for (int64_t k = 0; k < sizes.shared; ++k) {
    chosen[used + k] = static_cast<int32_t>(count + k);
    shares[used + k] = sizes.gated ? 1.0f / (1.0f + std::exp(-scores[count + k])) : 1.0f;
  }
}

}  // namespace

std::vector<Weight> parts_of(const Weight& whole, int64_t count) {
  if (count <= 0 || whole.rows % count || whole.rows / count % kTile) {
    throw std::invalid_argument("experts and heads are as wide as whole tiles");
  }
  std::vector<Weight> parts(static_cast<size_t>(count), whole);
  for (int64_t n = 0; n < count; ++n) {
    Weight& part = parts[static_cast<size_t>(n)];
    part.rows = whole.rows / count;
    part.data = whole.tile(n * part.tiles());
    part.bytes = static_cast<size_t>(part.tiles() * part.tile_bytes());
  }
  return parts;
}

void Program::add_experts(int in, int scores, int out, const Weight& gate_up, const Weight& down,
                          const float* gate_up_bias, const float* down_bias,
                          const float* preference, const float* factors, ExpertSizes sizes,
                          int activation, ExpertBuffers buffers) {
  auto experts = std::make_shared<Experts>();
  experts->sizes = sizes;
  experts->buffers = buffers;
  experts->gate_up = parts_of(gate_up, sizes.own);
  experts->down = parts_of(down, sizes.own);
  experts->gate_up_bias = gate_up_bias;
  experts->down_bias = down_bias;
  experts->preference = preference;
  experts->factors = factors;
  const size_t places = static_cast<size_t>(max_rows_ * sizes.places());
  experts->chosen.resize(places);
  experts->shares.resize(places);
  experts->places.resize(places);
  experts->starts.resize(static_cast<size_t>(sizes.own) + 1);
  Instruction i;
  i.op = Op::kExperts;
  i.in = in;
  i.in2 = scores;
  i.out = out;
  i.activation = activation;
  i.experts = std::move(experts);
  add(std::move(i));
}

void Program::experts_step(const Instruction& i, int64_t rows) {
  Experts& e = *i.experts;
  const int64_t places = e.sizes.places(), count = e.sizes.count;
  const Value &in = values_[i.in], &scores = values_[i.in2], &out = values_[i.out];
  pool_->run(rows, kRowGrain, [&](int64_t first, int64_t last) {
    float* likely = scratch(count);
    for (int64_t row = first; row < last; ++row) {
      choose(scores.floats.get() + row * e.sizes.scores(), e, likely,
             e.chosen.data() + row * places, e.shares.data() + row * places);
    }
  });
  e.sort(rows);
  const Value &gathered = values_[e.buffers.gathered], &hidden = values_[e.buffers.hidden];
  const Value &gated = values_[e.buffers.gated], &results = values_[e.buffers.results];
  pool_->run(rows, kRowGrain, [&](int64_t first, int64_t last) {
    for (int64_t n = first * places; n < last * places; ++n) {
      if (e.places[n] >= 0) gathered.copy_row(in, n / places, e.places[n]);
    }
  });
  multiply_experts(e, e.gate_up, e.gate_up_bias, gathered, hidden.floats.get());
  pool_->run(e.starts.back(), kRowGrain, [&](int64_t first, int64_t last) {
    float* values = scratch(gated.width);
    for (int64_t row = first; row < last; ++row) {
      kernels_.gated_row(hidden.floats.get() + row * hidden.width, gated.width, i.activation, values);
      store_row(gated, row, values);
    }
  });
  multiply_experts(e, e.down, e.down_bias, gated, results.floats.get());
  const int64_t width = results.width;
  pool_->run(rows, kRowGrain, [&](int64_t first, int64_t last) {
    for (int64_t n = first * places; n < last * places; ++n) {
      float* target = out.floats.get() + n * width;
      if (e.places[n] < 0) {
        std::fill_n(target, width, 0.0f);
        continue;
      }
      const float* result = results.floats.get() + e.places[n] * width;
      for (int64_t c = 0; c < width; ++c) target[c] = result[c] * e.shares[n];
    }
  });
}

// Where each chosen expert's row goes, experts in order, rows in order within each; -1 for those that
// are not here.
void Experts::sort(int64_t rows) {
  std::fill(starts.begin(), starts.end(), 0);
  const int64_t total = rows * sizes.places();
  const auto own = [&](int64_t n) { return chosen[n] - sizes.first; };
  for (int64_t n = 0; n < total; ++n) {
    if (own(n) >= 0 && own(n) < sizes.own) ++starts[own(n) + 1];
  }
  for (size_t n = 1; n < starts.size(); ++n) starts[n] += starts[n - 1];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t n = 0; n < total; ++n) {
    places[n] = own(n) >= 0 && own(n) < sizes.own ? next[own(n)]++ : -1;
  }
}

// y = x . w (+ bias) of each expert, for the rows that are its own.
void Program::multiply_experts(const Experts& e, const std::vector<Weight>& weights,
                               const float* bias, const Value& value, float* y) {
  std::vector<int64_t> active;
  for (int64_t n = 0; n < e.sizes.own; ++n) {
    if (e.starts[n + 1] > e.starts[n]) active.push_back(n);
  }
  if (active.empty()) return;
  const Activations x = value.activations();
  const int64_t tiles = weights[0].tiles(), busy = static_cast<int64_t>(active.size());
  const int64_t pieces =
      std::max<int64_t>(1, std::min(pool_->threads() * kPiecesAThread / busy, tiles / 2));
  pool_->run(busy * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t expert = active[static_cast<size_t>(n / pieces)];
      const Weight& w = weights[static_cast<size_t>(expert)];
      kernels_.matmul(w, x, e.starts[expert], e.starts[expert + 1] - e.starts[expert],
                      bias ? bias + expert * w.rows : nullptr, y, w.cut(n % pieces, pieces),
                      w.cut(n % pieces + 1, pieces), Soon{});
    }
  });
}

// One row of another value, in the forms that this one has.
void Program::Value::copy_row(const Value& from, int64_t source, int64_t target) const {
  const auto copy = [&](const auto& a, const auto& b, int64_t size) {
    if (b) std::memcpy(b.get() + target * size, a.get() + source * size, size * sizeof(b[0]));
  };
  copy(from.floats, floats, width);
  copy(from.bf16, bf16, width);
  copy(from.groups, groups, width / kGroup);
  copy(from.row_values, row_values, Activations::row_stride(width));
  copy(from.row_scales, row_scales, 1);
  copy(from.row_offsets, row_offsets, 1);
}

}  // namespace ryzanstein
