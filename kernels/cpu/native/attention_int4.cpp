// Attention over a cache of int4 in groups of 32: products of whole numbers within a group, whose
// scale and lowest value then count for every token. Keys lie there as `spread` makes them, so
// queries go through it, too.
#include "attention.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

constexpr int kGroup = 32;
constexpr int kTiles = kWide ? 2 : 1;  // of keys that one pass covers

// As for int8, and what the groups add.
struct GroupState : State<CacheFormat::kInt8> {
  float query_sums[kQueryRows][kMaxDim / kGroup];  // of the rounded query
  float lowest[kQueryRows];                        // softmax weights times lowest values

  void begin(int row, const float* q, int64_t dim, float sink) {
    alignas(64) float rotated[kMaxDim];
    std::memcpy(rotated, q, static_cast<size_t>(dim) * sizeof(float));
    spread(rotated, dim);
    State::begin(row, rotated, dim, sink);
    const auto* rounded = reinterpret_cast<const int8_t*>(queries[row]);
    for (int64_t g = 0; g < dim / kGroup; ++g) {
      int32_t sum = 0;
      for (int64_t i = 0; i < kGroup; ++i) sum += rounded[g * kGroup + i];
      query_sums[row][g] = static_cast<float>(sum);
    }
  }
};

// scores[first + r][tokens of T tiles] = scale * q . k. Fetches `ahead` meanwhile, tiles as long.
template <int T, int R>
void score(GroupState* state, int first, int64_t token, const uint8_t* const* keys,
           const uint16_t* const* scales, int64_t groups, float scale, const uint8_t* const* ahead,
           int aheads) {
  Floats sum[T][R];
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int r = 0; r < R; ++r) sum[t][r] = zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    Partial whole[T][R];
    UNROLL for (int t = 0; t < T; ++t) {
      UNROLL for (int r = 0; r < R; ++r) whole[t][r] = no_products();
    }
    for (int64_t word = g * 4; word < g * 4 + 4; ++word) {
      for (int a = 0; a < aheads; ++a) _mm_prefetch(ahead[a] + word * 64, _MM_HINT_T1);
      Bytes low[T], high[T];
      UNROLL for (int t = 0; t < T; ++t) {
        const Bytes both = load_bytes(keys[t] + word * 64);
        low[t] = field<0, 4>(both);
        high[t] = field<4, 4>(both);
      }
      UNROLL for (int r = 0; r < R; ++r) {
        const uint8_t* query = state->queries[first + r] + word * 8;
        const Bytes q = broadcast4(query), p = broadcast4(query + 4);
        UNROLL for (int t = 0; t < T; ++t) {
          whole[t][r] = dot_partial(dot_partial(whole[t][r], low[t], q), high[t], p);
        }
      }
    }
    UNROLL for (int t = 0; t < T; ++t) {
      const Floats step = load_half(scales[t] + g * kGroup);
      const Floats lowest = load_half(scales[t] + g * kGroup + 16);
      UNROLL for (int r = 0; r < R; ++r) {
        sum[t][r] = fma(to_floats(widen(whole[t][r])), step, sum[t][r]);
        sum[t][r] = fma(set1(state->query_sums[first + r][g]), lowest, sum[t][r]);
      }
    }
  }
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int r = 0; r < R; ++r) {
      const Floats factor = set1(scale * state->query_scales[first + r]);
      store(state->scores[first + r] + token + t * 16, mul(sum[t][r], factor));
    }
  }
}

void score_block(const Task& task, int64_t base, int64_t tokens, GroupState* state) {
  const LayerCache& cache = task.cache;
  const int64_t groups = cache.dim / kGroup;
  for (int64_t token = 0; token < tokens;) {
    const int64_t left = (tokens - token + 15) / 16;
    const int count = left >= kTiles ? kTiles : 1;
    const uint8_t *keys[kTiles], *ahead[2 * kTiles];
    const uint16_t* scales[kTiles];
    int aheads = 0;
    for (int t = 0; t < count; ++t) {
      const int64_t at = base + token + t * 16, tile = task.tile(at);
      keys[t] = cache.keys + tile;
      scales[t] =
          cache.half_scale(cache.key_scales, task.page(at), task.head, at % cache.page_size, 0);
      ahead[aheads++] = cache.values + tile;
      if (at + count * 16 < base + tokens) {
        ahead[aheads++] = cache.keys + task.tile(at + count * 16);
      }
    }
    each_pass<kPass>(task.rows, [&](auto r, int first) {
      constexpr int R = decltype(r)::value;
      const int fetch = first == 0 ? aheads : 0;
      if (count == kTiles) {
        score<kTiles, R>(state, first, token, keys, scales, groups, task.scale, ahead, fetch);
      } else {
        score<1, R>(state, first, token, keys, scales, groups, task.scale, ahead, fetch);
      }
    });
    token += count * 16;
  }
}

// The scales of a group's values, and where the group's values of the block begin.
struct Group {
  const uint16_t* scales[kBlock / 16];  // of each tile of 16 tokens
  const uint8_t* tiles[kBlock / 16];
  int count;
  int64_t stride;  // bytes from four tokens to the next four: dim * 2
};

// One row's softmax weights times the group's scales as words, and times the lowest values summed.
void weigh(GroupState* state, int row, const Group& group) {
  alignas(64) float kept[kBlock];
  float* weights = state->scores[row];
  Floats lowest = zero();
  for (int t = 0; t < group.count; ++t) {
    const Floats w = load(weights + t * 16);
    store(kept + t * 16, w);
    // Places behind the sequence's end hold what another one left there, whatever it was.
    const Mask seen = greater(w, zero());
    store(weights + t * 16, keep(seen, mul(w, load_half(group.scales[t]))));
    lowest = add(lowest, keep(seen, mul(w, load_half(group.scales[t] + 16))));
  }
  state->lowest[row] = sum_lanes(lowest);
  state->narrow_weights(row, group.count * 16);
  std::memcpy(weights, kept, static_cast<size_t>(group.count) * 16 * sizeof(float));
}

// acc[first + r][32 dims at `dim`] += weights . values
template <int R>
void mix(GroupState* state, int first, int64_t dim, const Group& group) {
  Ints upper[R][2], lower[R][2];
  UNROLL for (int r = 0; r < R; ++r) {
    for (int d = 0; d < 2; ++d) upper[r][d] = lower[r][d] = set1_int(0);
  }
  for (int t = 0; t < group.count; ++t) {
    for (int64_t word = 0; word < 4; ++word) {
      const Bytes both = load_bytes(group.tiles[t] + word * group.stride);
      const Bytes v[2] = {field<0, 4>(both), field<4, 4>(both)};
      UNROLL for (int r = 0; r < R; ++r) {
        const int64_t at = t * 16 + word * 4;
        const Bytes high = broadcast4(state->weights[first + r] + at);
        const Bytes low = broadcast4(state->low[first + r] + at);
        for (int d = 0; d < 2; ++d) {
          upper[r][d] = dot_small(upper[r][d], high, v[d]);
          lower[r][d] = dot_small(lower[r][d], low, v[d]);
        }
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    for (int d = 0; d < 2; ++d) {
      float* acc = state->acc[first + r] + dim + 16 * d;
      const Floats whole = fma(to_floats(upper[r][d]), set1(128.0f), to_floats(lower[r][d]));
      const Floats sum = fma(whole, set1(state->weight_scales[first + r]), load(acc));
      store(acc, add(sum, set1(state->lowest[first + r])));
    }
  }
}

void mix_block(const Task& task, int64_t base, int64_t tokens, GroupState* state) {
  const LayerCache& cache = task.cache;
  Group group;
  group.count = 0;
  group.stride = cache.dim * 2;
  for (int64_t t = 0; t < tokens; t += 16) {
    const int64_t at = base + t;
    group.tiles[group.count] = cache.values + task.tile(at);
    group.scales[group.count++] =
        cache.half_scale(cache.value_scales, task.page(at), task.head, at % cache.page_size, 0);
  }
  for (int64_t dim = 0; dim < cache.dim; dim += kGroup) {
    for (int r = 0; r < task.rows; ++r) weigh(state, r, group);
    each_pass<kMixPass>(task.rows, [&](auto r, int first) {
      mix<decltype(r)::value>(state, first, dim, group);
    });
    for (int t = 0; t < group.count; ++t) {
      group.tiles[t] += 64;
      group.scales[t] += kGroup;
    }
  }
}

}  // namespace

void attend_int4(const LayerCache& cache, const int32_t* pages, int64_t head, int rows,
                 const float* const* queries, const int64_t* positions, const float* sinks,
                 float scale, int64_t window, float* const* out) {
  const Task task{cache, pages, head, rows, positions, sinks, scale, window};
  attend_with<GroupState>(task, queries, out);
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
