// Paged attention with an online softmax (arXiv 2205.14135) in blocks of 256 positions, counted from
// the sequence's start, so that a row's sums never depend on which rows share its pass: what all
// formats of the cache have in common.
#pragma once

#include <limits>

#include "rounding.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

constexpr int kBlock = 256;
constexpr float kLowest = -std::numeric_limits<float>::infinity();
// Rows that share a pass over keys or values, and tiles of keys that one pass covers: every operand
// that is loaded has to feed several products. Fewer registers hold the sums of several tiles only
// for few rows. Int8 and int4 have two sums for each value.
constexpr int kPass = kWide ? 6 : 4, kKeyTiles = kWide ? 4 : 2, kManyRows = kWide ? kPass : 2;
constexpr int kMixPass = kWide ? 6 : 2;

// What rows lie apart: no power of two, which would leave them few sets of the cache.
constexpr int kRowDim = kMaxDim + 128;

template <CacheFormat kFormat>
constexpr int kElements =  // of the cache in a word of four bytes
    kFormat == CacheFormat::kF32 ? 1 : kFormat == CacheFormat::kBf16 ? 2 : 4;
// Bytes of a query's or a softmax weight's element that is multiplied with them.
template <CacheFormat kFormat>
constexpr int kOperand = kFormat == CacheFormat::kF32    ? 4
                         : kFormat == CacheFormat::kBf16 ? static_cast<int>(sizeof(PairValue))
                                                         : 1;

// What one task works on: queries and softmax weights as what the cache's words are multiplied
// with. Softmax weights beside int8 values have 14 bits: seven in `weights`, seven in `low`.
template <CacheFormat kFormat>
struct State {
  alignas(64) float scores[kQueryRows][kBlock];
  alignas(64) float acc[kQueryRows][kRowDim];
  alignas(64) uint8_t queries[kQueryRows][kRowDim * kOperand<kFormat>];
  alignas(64) uint8_t weights[kQueryRows][kBlock * kOperand<kFormat>];
  alignas(64) uint8_t low[kQueryRows][kBlock];
  float maximum[kQueryRows], total[kQueryRows];
  float query_scales[kQueryRows], weight_scales[kQueryRows];
  int32_t query_offsets[kQueryRows];

  // `sink` is the score of a key without a value, or kLowest.
  void begin(int row, const float* q, int64_t dim, float sink) {
    maximum[row] = sink;
    total[row] = sink == kLowest ? 0.0f : 1.0f;
    std::memset(acc[row], 0, static_cast<size_t>(dim + 15) / 16 * 16 * sizeof(float));
    if (kFormat == CacheFormat::kF32) {
      std::memcpy(queries[row], q, static_cast<size_t>(dim) * 4);
    } else if (kFormat == CacheFormat::kBf16) {
      store_pairs(q, dim, reinterpret_cast<PairValue*>(queries[row]));
    } else {
      int32_t sum;
      auto* out = reinterpret_cast<int8_t*>(queries[row]);
      query_scales[row] = round_to_int8(q, dim, out, &sum);
      query_offsets[row] = -128 * sum;
    }
  }

  // Softmax weights in place of `count` scores -> words.
  void narrow_weights(int row, int64_t count) {
    if (kFormat == CacheFormat::kF32) {
      std::memcpy(weights[row], scores[row], static_cast<size_t>(count) * 4);
    } else if (kFormat == CacheFormat::kBf16) {
      store_pairs(scores[row], count, reinterpret_cast<PairValue*>(weights[row]));
    } else {
      constexpr float kMost = 127 * 128 + 127;
      Floats highest = zero();
      for (int64_t i = 0; i < count; i += 16) highest = max(highest, load(scores[row] + i));
      const float largest = max_lanes(highest);
      weight_scales[row] = largest < kSmallest ? 0.0f : largest / kMost;
      const Floats factor = set1(largest < kSmallest ? 0.0f : kMost / largest);
      for (int64_t i = 0; i < count; i += 16) {
        const Floats whole = round(mul(load(scores[row] + i), factor));
        const Floats upper = round(sub(mul(whole, set1(1.0f / 128.0f)), set1(0.498f)));
        store_int8(reinterpret_cast<int8_t*>(weights[row] + i), to_ints(upper));
        store_int8(reinterpret_cast<int8_t*>(low[row] + i),
                   to_ints(fnma(upper, set1(128.0f), whole)));
      }
    }
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};
// Calls body(Count<count>()) for a count of at most N.
template <int N, class Body>
inline void with_count(int count, const Body& body) {
  if constexpr (N > 0) {
    if (count == N) return body(Count<N>());
    with_count<N - 1>(count, body);
  }
}
// Calls body(Count<how many>(), first row) for passes of at most N over `rows` rows.
template <int N, class Body>
inline void each_pass(int rows, const Body& body) {
  for (int first = 0; first < rows; first += N) {
    with_count<N>(rows - first < N ? rows - first : N, [&](auto r) { body(r, first); });
  }
}

// Softmax weights of one row's block in place; returns what older sums have to be multiplied by.
inline float soften(float* scores, int64_t count, int64_t from, int64_t to, float* maximum, float* total) {
  for (int64_t i = 0; i < least(from, count); ++i) scores[i] = kLowest;
  for (int64_t i = most(to, 0); i < count; ++i) scores[i] = kLowest;
  Floats largest = set1(kLowest);
  for (int64_t i = 0; i < count; i += 16) largest = max(largest, load(scores + i));
  const float block = max_lanes(largest);
  const float now = *maximum > block ? *maximum : block;
  if (block == kLowest) {
    std::memset(scores, 0, static_cast<size_t>(count) * sizeof(float));
    return 1.0f;
  }
  const Floats offset = set1(now);
  Floats sum = zero();
  for (int64_t i = 0; i < count; i += 16) {
    const Floats s = load(scores + i);
    const Floats e = keep(greater(s, set1(kLowest)), exp(sub(s, offset)));
    store(scores + i, e);
    sum = add(sum, e);
  }
  float correction = 0.0f;
  if (*maximum != kLowest) {
    float lanes[16];
    store(lanes, exp(set1(*maximum - now)));
    correction = lanes[0];
  }
  *total = *total * correction + sum_lanes(sum);
  *maximum = now;
  return correction;
}

inline void scale_row(float* x, float factor, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) store(x + i, mul(load(x + i), set1(factor)));
}

struct Task {
  const LayerCache& cache;
  const int32_t* pages;
  int64_t head;
  int rows;
  const int64_t* positions;
  const float* sinks;
  float scale;
  int64_t window;

  int64_t page(int64_t position) const { return pages[position / cache.page_size]; }
  int64_t tile(int64_t position) const {
    return cache.tile(page(position), head, position % cache.page_size);
  }
};

// A thread's own; asked for once a task, since each use of its name would be a call.
template <class AnyState>
[[gnu::noinline]] AnyState* own_state() {
  static thread_local AnyState state;
  return &state;
}

// Attention by the `score_block` and `mix_block` that take a pointer to an AnyState.
template <class AnyState>
void attend_with(const Task& task, const float* const* rows, float* const* out) {
  AnyState& state = *own_state<AnyState>();
  const int64_t dim = task.cache.dim;
  int64_t last = 0, lowest = task.positions[0];
  for (int r = 0; r < task.rows; ++r) {
    state.begin(r, rows[r], dim, task.sinks ? task.sinks[r] : kLowest);
    last = most(last, task.positions[r] + 1);
    lowest = least(lowest, task.positions[r]);
  }
  const int64_t begin = task.window > 0 ? most(0, lowest - task.window + 1) : 0;
  for (int64_t base = begin / kBlock * kBlock; base < last; base += kBlock) {
    const int64_t tokens = least(kBlock, last - base), padded = (tokens + 15) / 16 * 16;
    score_block(task, base, tokens, &state);
    for (int r = 0; r < task.rows; ++r) {
      const int64_t position = task.positions[r];
      const int64_t from = task.window > 0 ? position - task.window + 1 - base : 0;
      const float correction = soften(state.scores[r], padded, from, position + 1 - base,
                                      state.maximum + r, state.total + r);
      if (correction != 1.0f) scale_row(state.acc[r], correction, dim);
    }
    mix_block(task, base, tokens, &state);
  }
  for (int r = 0; r < task.rows; ++r) {
    const Floats inverse = set1(1.0f / state.total[r]);
    for (int64_t i = 0; i < dim; i += 16) {
      store(out[r] + i, mul(load(state.acc[r] + i), inverse), dim - i);
    }
  }
}

}  // namespace

// What `attend` does for a cache in kInt4.
void attend_int4(const LayerCache& cache, const int32_t* pages, int64_t head, int rows,
                 const float* const* queries, const int64_t* positions, const float* sinks,
                 float scale, int64_t window, float* const* out);

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
