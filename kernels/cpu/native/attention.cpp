// Paged attention with an online softmax (arXiv 2205.14135) in blocks of 256 positions, counted from
// the sequence's start, so that a row's sums never depend on which rows share its pass.
#include <limits>

#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

constexpr int kBlock = 256;
constexpr float kLowest = -std::numeric_limits<float>::infinity();
// Rows that share a pass over keys or values, and tiles of keys that one pass covers: every operand
// that is loaded has to feed several products.
constexpr int kPass = kWide ? 6 : 2, kKeyTiles = kWide ? 4 : 1;

// Rounds a row to int8 under one scale, which is returned; `out` has room for whole registers.
float round_to_int8(const float* x, int64_t count, int8_t* out, int32_t* sum) {
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

void round_to_bf16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) store_bf16(out + i, load(x + i, count - i), count - i);
}

template <CacheFormat kFormat>
constexpr int kElements =  // of the cache in a word of four bytes
    kFormat == CacheFormat::kF32 ? 1 : kFormat == CacheFormat::kBf16 ? 2 : 4;

// What one task works on: queries and softmax weights as words that the cache's words are multiplied
// with. Softmax weights beside int8 values have 14 bits: seven in `weights`, seven in `low`.
template <CacheFormat kFormat>
struct State {
  static constexpr int n = kElements<kFormat>;
  alignas(64) float scores[kQueryRows][kBlock];
  alignas(64) float acc[kQueryRows][kMaxDim];
  alignas(64) uint8_t queries[kQueryRows][kMaxDim * 4 / n];
  alignas(64) uint8_t weights[kQueryRows][kBlock * 4 / n];
  alignas(64) uint8_t low[kQueryRows][kBlock];
  float maximum[kQueryRows], total[kQueryRows];
  float query_scales[kQueryRows], weight_scales[kQueryRows];
  int32_t query_offsets[kQueryRows];

  void begin(int row, const float* q, int64_t dim) {
    maximum[row] = kLowest;
    total[row] = 0.0f;
    std::memset(acc[row], 0, sizeof acc[row]);
    if (kFormat == CacheFormat::kF32) {
      std::memcpy(queries[row], q, static_cast<size_t>(dim) * 4);
    } else if (kFormat == CacheFormat::kBf16) {
      round_to_bf16(q, dim, reinterpret_cast<uint16_t*>(queries[row]));
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
      round_to_bf16(scores[row], count, reinterpret_cast<uint16_t*>(weights[row]));
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

// scores[first + r][tokens of T tiles] = scale * q . k. Fetches `ahead` meanwhile, tiles as long.
template <CacheFormat kFormat, int T, int R>
void score(State<kFormat>* state, int first, int64_t token, const uint8_t* const* keys,
           const float* const* key_scales, int64_t words, float scale,
           const uint8_t* const* ahead, int aheads) {
  constexpr bool kInt8 = kFormat == CacheFormat::kInt8;
  Floats sum[T][R];
  Ints whole[T][R];
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      if (kInt8) {
        whole[t][r] = start_signed(state->query_offsets + first + r);
      } else {
        sum[t][r] = zero();
      }
    }
  }
  for (int64_t i = 0; i < words; ++i) {
    for (int a = 0; a < aheads; ++a) _mm_prefetch(ahead[a] + i * 64, _MM_HINT_T1);
    if constexpr (kInt8) {
      Signed k[T];
      for (int t = 0; t < T; ++t) k[t] = load_signed(keys[t] + i * 64);
      for (int r = 0; r < R; ++r) {
        const Bytes q = broadcast4(state->queries[first + r] + i * 4);
        for (int t = 0; t < T; ++t) whole[t][r] = dot_signed(whole[t][r], k[t], q);
      }
    } else if constexpr (kFormat == CacheFormat::kBf16) {
      Pairs k[T];
      for (int t = 0; t < T; ++t) k[t] = load_pairs(keys[t] + i * 64);
      for (int r = 0; r < R; ++r) {
        const Pairs q =
            broadcast_pair(reinterpret_cast<const uint16_t*>(state->queries[first + r]) + i * 2);
        for (int t = 0; t < T; ++t) sum[t][r] = dot_pairs(sum[t][r], k[t], q);
      }
    } else {
      Floats k[T];
      for (int t = 0; t < T; ++t) k[t] = load(reinterpret_cast<const float*>(keys[t] + i * 64));
      for (int r = 0; r < R; ++r) {
        const Floats q = set1(reinterpret_cast<const float*>(state->queries[first + r])[i]);
        for (int t = 0; t < T; ++t) sum[t][r] = fma(k[t], q, sum[t][r]);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      Floats factor = set1(scale);
      if (kInt8) {
        factor = mul(load(key_scales[t]), set1(scale * state->query_scales[first + r]));
        sum[t][r] = to_floats(whole[t][r]);
      }
      store(state->scores[first + r] + token + t * 16, mul(sum[t][r], factor));
    }
  }
}

// The values of a block: where each page's begin, and how many words of tokens lie in it.
struct Values {
  const uint8_t* pages[kBlock / 16];
  int64_t words[kBlock / 16];  // whole ones
  int count;
  int64_t stride;  // bytes from one word of tokens to the next: dim * 4
  int64_t left;    // tokens in one last word that is not whole
};

// acc[first + r][16 D dims at `dim`] += weights . values
template <CacheFormat kFormat, int D, int R>
void mix(State<kFormat>* state, int first, int64_t dim, const Values& values) {
  constexpr bool kInt8 = kFormat == CacheFormat::kInt8;
  Floats sum[R][D];
  Ints upper[R][D], lower[R][D];
  for (int r = 0; r < R; ++r) {
    for (int d = 0; d < D; ++d) {
      sum[r][d] = load(state->acc[first + r] + dim + 16 * d);
      if (kInt8) upper[r][d] = lower[r][d] = set1_int(0);
    }
  }
  const auto add_word = [&](const uint8_t* at, int64_t word, bool whole) {
    Bytes v[D];
    for (int d = 0; d < D; ++d) {
      v[d] = load_bytes(at + 64 * d);
      if (!whole) v[d] = first_elements(v[d], values.left, 4 / kElements<kFormat>);
    }
    for (int r = 0; r < R; ++r) {
      const uint8_t* weight = state->weights[first + r] + word * 4;
      if constexpr (kInt8) {
        const Bytes high = broadcast4(weight), low = broadcast4(state->low[first + r] + word * 4);
        for (int d = 0; d < D; ++d) {
          upper[r][d] = dot_small(upper[r][d], high, v[d]);
          lower[r][d] = dot_small(lower[r][d], low, v[d]);
        }
      } else if constexpr (kFormat == CacheFormat::kBf16) {
        const Pairs w = broadcast_pair(reinterpret_cast<const uint16_t*>(weight));
        for (int d = 0; d < D; ++d) sum[r][d] = dot_pairs(sum[r][d], as_pairs(v[d]), w);
      } else {
        const Floats w = set1(*reinterpret_cast<const float*>(weight));
        for (int d = 0; d < D; ++d) sum[r][d] = fma(as_floats(v[d]), w, sum[r][d]);
      }
    }
  };
  int64_t word = 0;
  for (int page = 0; page < values.count; ++page) {
    const uint8_t* at = values.pages[page] + dim * 4;
    for (int64_t i = 0; i < values.words[page]; ++i, ++word, at += values.stride) {
      add_word(at, word, true);
    }
    if (values.left && page == values.count - 1) add_word(at, word, false);
  }
  for (int r = 0; r < R; ++r) {
    for (int d = 0; d < D; ++d) {
      if (kInt8) {
        const Floats whole = fma(to_floats(upper[r][d]), set1(128.0f), to_floats(lower[r][d]));
        sum[r][d] = fma(whole, set1(state->weight_scales[first + r]), sum[r][d]);
      }
      store(state->acc[first + r] + dim + 16 * d, sum[r][d]);
    }
  }
}

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
// Calls body(Count<how many>(), first row) for passes over `rows` rows.
template <class Body>
inline void each_pass(int rows, const Body& body) {
  for (int first = 0; first < rows; first += kPass) {
    with_count<kPass>(rows - first < kPass ? rows - first : kPass,
                      [&](auto r) { body(r, first); });
  }
}

// Softmax weights of one row's block in place; returns what older sums have to be multiplied by.
float soften(float* scores, int64_t count, int64_t from, int64_t to, float* maximum, float* total) {
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

void scale_row(float* x, float factor, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) store(x + i, mul(load(x + i), set1(factor)));
}

struct Task {
  const LayerCache& cache;
  const int32_t* pages;
  int64_t head;
  int rows;
  const int64_t* positions;
  float scale;
  int64_t window;

  int64_t page(int64_t position) const { return pages[position / cache.page_size]; }
  int64_t tile(int64_t position) const {
    return cache.tile(page(position), head, position % cache.page_size);
  }
};

// Scores of the block's tokens; meanwhile the next tiles' keys and these tiles' values are fetched.
template <CacheFormat kFormat>
void score_block(const Task& task, int64_t base, int64_t tokens, State<kFormat>* state) {
  const LayerCache& cache = task.cache;
  const int64_t words = cache.dim / kElements<kFormat>;
  for (int64_t token = 0; token < tokens;) {
    const int64_t left = (tokens - token + 15) / 16;
    const int count = left >= kKeyTiles ? kKeyTiles : 1;
    const uint8_t *keys[kKeyTiles], *ahead[2 * kKeyTiles];
    const float* scales[kKeyTiles];
    int aheads = 0;
    for (int t = 0; t < count; ++t) {
      const int64_t at = base + token + t * 16, tile = task.tile(at);
      keys[t] = cache.keys + tile;
      ahead[aheads++] = cache.values + tile;
      if (at + count * 16 < base + tokens) {
        ahead[aheads++] = cache.keys + task.tile(at + count * 16);
      }
      if (kFormat == CacheFormat::kInt8) {
        scales[t] = cache.key_scales + cache.place(task.page(at), task.head, at % cache.page_size);
      }
    }
    each_pass(task.rows, [&](auto r, int first) {
      constexpr int R = decltype(r)::value;
      const int fetch = first == 0 ? aheads : 0;
      if (count == kKeyTiles) {
        score<kFormat, kKeyTiles, R>(state, first, token, keys, scales, words, task.scale, ahead,
                                     fetch);
      } else {
        score<kFormat, 1, R>(state, first, token, keys, scales, words, task.scale, ahead, fetch);
      }
    });
    token += count * 16;
  }
}

template <CacheFormat kFormat>
void mix_block(const Task& task, int64_t base, int64_t tokens, State<kFormat>* state) {
  constexpr int n = kElements<kFormat>;
  constexpr int kDims = !kWide ? 1 : n == 4 ? 2 : 4;  // registers of values a pass
  const LayerCache& cache = task.cache;
  Values values;
  values.count = 0;
  values.stride = cache.dim * 4;
  values.left = tokens % n;
  for (int64_t t = 0; t < tokens; t += cache.page_size) {
    const int64_t here = least(cache.page_size, tokens - t);
    values.pages[values.count] = cache.values + task.tile(base + t);
    values.words[values.count++] = here / n;
    if (kFormat != CacheFormat::kInt8) continue;
    const float* scales = cache.value_scales + cache.place(task.page(base + t), task.head, 0);
    for (int r = 0; r < task.rows; ++r) {
      float* weights = state->scores[r] + t;
      for (int64_t i = 0; i < here; i += 16) {
        // Places behind the sequence's end hold what another one left there, whatever it was.
        const Floats w = load(weights + i);
        store(weights + i, keep(greater(w, zero()), mul(w, load(scales + i))));
      }
    }
  }
  for (int r = 0; r < task.rows; ++r) state->narrow_weights(r, (tokens + 15) / 16 * 16);
  each_pass(task.rows, [&](auto r, int first) {
    constexpr int R = decltype(r)::value;
    int64_t dim = 0;
    for (; dim + 16 * kDims <= cache.dim; dim += 16 * kDims) {
      mix<kFormat, kDims, R>(state, first, dim, values);
    }
    for (; dim < cache.dim; dim += 16) mix<kFormat, 1, R>(state, first, dim, values);
  });
}

template <CacheFormat kFormat>
void attend_as(const Task& task, const float* const* rows, float* const* out) {
  static thread_local State<kFormat> state;
  const int64_t dim = task.cache.dim;
  int64_t last = 0, lowest = task.positions[0];
  for (int r = 0; r < task.rows; ++r) {
    state.begin(r, rows[r], dim);
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

// One token's head as the cache stores it, in place of `narrow`; sets the scale if there is one.
const uint8_t* narrow_row(CacheFormat format, const float* x, int64_t dim, uint8_t* narrow,
                          float* scale) {
  if (format == CacheFormat::kF32) return reinterpret_cast<const uint8_t*>(x);
  if (format == CacheFormat::kBf16) {
    round_to_bf16(x, dim, reinterpret_cast<uint16_t*>(narrow));
  } else {
    int32_t sum;
    *scale = round_to_int8(x, dim, reinterpret_cast<int8_t*>(narrow), &sum);
  }
  return narrow;
}

}  // namespace

void write_key(const LayerCache& cache, int64_t slot, int64_t head, const float* key) {
  const int64_t page = slot / cache.page_size, token = slot % cache.page_size;
  const bool int8 = cache.format == CacheFormat::kInt8;
  alignas(64) uint8_t narrow[kMaxDim * 2];
  float* scale = int8 ? cache.key_scales + cache.place(page, head, token) : nullptr;
  const uint8_t* source = narrow_row(cache.format, key, cache.dim, narrow, scale);
  if (int8) {
    for (int64_t i = 0; i < cache.dim; ++i) narrow[i] = static_cast<uint8_t>(narrow[i] + 128);
  }
  uint8_t* out = cache.keys + cache.tile(page, head, token) + token % 16 * 4;
  const int64_t words = cache.dim * cache.element() / 4;
  for (int64_t i = 0; i < words; ++i) std::memcpy(out + i * 64, source + i * 4, 4);
}

void write_value(const LayerCache& cache, int64_t slot, int64_t head, const float* value) {
  const int64_t page = slot / cache.page_size, token = slot % cache.page_size;
  const int64_t element = cache.element(), n = 4 / element;
  alignas(64) uint8_t narrow[kMaxDim * 2];
  float* scale = cache.format == CacheFormat::kInt8
                     ? cache.value_scales + cache.place(page, head, token)
                     : nullptr;
  const uint8_t* source = narrow_row(cache.format, value, cache.dim, narrow, scale);
  uint8_t* out = cache.values + cache.tile(page, head, token) +
                 (token % 16 / n * cache.dim * n + token % n) * element;
  for (int64_t i = 0; i < cache.dim; ++i) {
    std::memcpy(out + i * 4, source + i * element, static_cast<size_t>(element));
  }
}

void attend(const LayerCache& cache, const int32_t* pages, int64_t head, int rows,
            const float* const* queries, const int64_t* positions, float scale, int64_t window,
            float* const* out) {
  const Task task{cache, pages, head, rows, positions, scale, window};
  switch (cache.format) {
    case CacheFormat::kF32: return attend_as<CacheFormat::kF32>(task, queries, out);
    case CacheFormat::kBf16: return attend_as<CacheFormat::kBf16>(task, queries, out);
    case CacheFormat::kInt8: return attend_as<CacheFormat::kInt8>(task, queries, out);
  }
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
