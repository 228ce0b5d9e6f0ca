// Attention over caches of fp32, bfloat16 and int8.
#include "attention.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

// Some tiles of keys, and what is fetched while they are scored: the same tokens' values and the keys
// that come next.
struct Keys {
  const uint8_t* tiles[kKeyTiles];
  const uint8_t* values[kKeyTiles];
  const uint8_t* next[kKeyTiles];
  const float* scales[kKeyTiles];
};

// scores[first + r][tokens of T tiles, `from` onwards] = scale * q . k
template <CacheFormat kFormat, int T, int R, bool kFetch>
void score(State<kFormat>* state, int first, int64_t token, const Keys& keys, int from,
           int64_t words, float scale) {
  constexpr bool kInt8 = kFormat == CacheFormat::kInt8;
  const uint8_t* const* tiles = keys.tiles + from;
  Floats sum[T][R];
  Ints whole[T][R];
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int r = 0; r < R; ++r) {
      if (kInt8) {
        whole[t][r] = start_signed(state->query_offsets + first + r);
      } else {
        sum[t][r] = zero();
      }
    }
  }
  for (int64_t i = 0; i < words; ++i) {
    if constexpr (kFetch) {
      UNROLL for (int t = from; t < from + T; ++t) {
        _mm_prefetch(keys.values[t] + i * 64, _MM_HINT_T1);
        _mm_prefetch(keys.next[t] + i * 64, _MM_HINT_T1);
      }
    }
    if constexpr (kInt8) {
      Signed k[T];
      UNROLL for (int t = 0; t < T; ++t) k[t] = load_signed(tiles[t] + i * 64);
      UNROLL for (int r = 0; r < R; ++r) {
        const Bytes q = broadcast4(state->queries[first + r] + i * 4);
        UNROLL for (int t = 0; t < T; ++t) whole[t][r] = dot_signed(whole[t][r], k[t], q);
      }
    } else if constexpr (kFormat == CacheFormat::kBf16) {
      Pairs k[T];
      UNROLL for (int t = 0; t < T; ++t) k[t] = load_pairs(tiles[t] + i * 64);
      UNROLL for (int r = 0; r < R; ++r) {
        const Pairs q =
            broadcast_pair(reinterpret_cast<const PairValue*>(state->queries[first + r]) + i * 2);
        UNROLL for (int t = 0; t < T; ++t) sum[t][r] = dot_pairs(sum[t][r], k[t], q);
      }
    } else {
      Floats k[T];
      UNROLL for (int t = 0; t < T; ++t) {
        k[t] = load(reinterpret_cast<const float*>(tiles[t] + i * 64));
      }
      UNROLL for (int r = 0; r < R; ++r) {
        const Floats q = set1(reinterpret_cast<const float*>(state->queries[first + r])[i]);
        UNROLL for (int t = 0; t < T; ++t) sum[t][r] = fma(k[t], q, sum[t][r]);
      }
    }
  }
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int r = 0; r < R; ++r) {
      Floats factor = set1(scale);
      if (kInt8) {
        factor = mul(load(keys.scales[from + t]), set1(scale * state->query_scales[first + r]));
        sum[t][r] = to_floats(whole[t][r]);
      }
      store(state->scores[first + r] + token + (from + t) * 16, mul(sum[t][r], factor));
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
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int d = 0; d < D; ++d) {
      sum[r][d] = load(state->acc[first + r] + dim + 16 * d);
      if (kInt8) upper[r][d] = lower[r][d] = set1_int(0);
    }
  }
  const auto add_word = [&](const uint8_t* at, int64_t word, bool whole) {
    Bytes v[D];
    UNROLL for (int d = 0; d < D; ++d) {
      v[d] = load_bytes(at + 64 * d);
      if (!whole) v[d] = first_elements(v[d], values.left, 4 / kElements<kFormat>);
    }
    UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* weight =
          state->weights[first + r] + word * kElements<kFormat> * kOperand<kFormat>;
      if constexpr (kInt8) {
        const Bytes high = broadcast4(weight), low = broadcast4(state->low[first + r] + word * 4);
        UNROLL for (int d = 0; d < D; ++d) {
          upper[r][d] = dot_small(upper[r][d], high, v[d]);
          lower[r][d] = dot_small(lower[r][d], low, v[d]);
        }
      } else if constexpr (kFormat == CacheFormat::kBf16) {
        const Pairs w = broadcast_pair(reinterpret_cast<const PairValue*>(weight));
        UNROLL for (int d = 0; d < D; ++d) sum[r][d] = dot_pairs(sum[r][d], as_pairs(v[d]), w);
      } else {
        const Floats w = set1(*reinterpret_cast<const float*>(weight));
        UNROLL for (int d = 0; d < D; ++d) sum[r][d] = fma(as_floats(v[d]), w, sum[r][d]);
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
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int d = 0; d < D; ++d) {
      if (kInt8) {
        const Floats whole = fma(to_floats(upper[r][d]), set1(128.0f), to_floats(lower[r][d]));
        sum[r][d] = fma(whole, set1(state->weight_scales[first + r]), sum[r][d]);
      }
      store(state->acc[first + r] + dim + 16 * d, sum[r][d]);
    }
  }
}

// Scores of the block's tokens; meanwhile the next tiles' keys and these tiles' values are fetched.
template <CacheFormat kFormat>
void score_block(const Task& task, int64_t base, int64_t tokens, State<kFormat>* state) {
  const LayerCache& cache = task.cache;
  const int64_t words = cache.dim / kElements<kFormat>;
  for (int64_t token = 0; token < tokens;) {
    const int64_t left = (tokens - token + 15) / 16;
    const int count = left >= kKeyTiles ? kKeyTiles : 1;
    Keys keys;
    for (int t = 0; t < count; ++t) {
      const int64_t at = base + token + t * 16, next = at + count * 16, tile = task.tile(at);
      keys.tiles[t] = cache.keys + tile;
      keys.values[t] = cache.values + tile;
      keys.next[t] = cache.keys + (next < base + tokens ? task.tile(next) : tile);
      if (kFormat == CacheFormat::kInt8) {
        keys.scales[t] =
            cache.scale(cache.key_scales, task.page(at), task.head, at % cache.page_size);
      }
    }
    each_pass<kPass>(task.rows, [&](auto r, int first) {
      constexpr int R = decltype(r)::value, T = R > kManyRows ? 1 : kKeyTiles;
      const auto score_tiles = [&](auto fetch) {
        constexpr bool kFetch = decltype(fetch)::value > 0;
        if (count == T) {
          return score<kFormat, T, R, kFetch>(state, first, token, keys, 0, words, task.scale);
        }
        for (int t = 0; t < count; ++t) {
          score<kFormat, 1, R, kFetch>(state, first, token, keys, t, words, task.scale);
        }
      };
      if (first == 0) {
        score_tiles(Count<1>());
      } else {
        score_tiles(Count<0>());
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
    const float* scales = cache.scale(cache.value_scales, task.page(base + t), task.head, 0);
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
  each_pass<n == 4 ? kMixPass : kPass>(task.rows, [&](auto r, int first) {
    constexpr int R = decltype(r)::value;
    int64_t dim = 0;
    for (; dim + 16 * kDims <= cache.dim; dim += 16 * kDims) {
      mix<kFormat, kDims, R>(state, first, dim, values);
    }
    for (; dim < cache.dim; dim += 16) mix<kFormat, 1, R>(state, first, dim, values);
  });
}

}  // namespace

void attend(const LayerCache& cache, const int32_t* pages, int64_t head, int rows,
            const float* const* queries, const int64_t* positions, const float* sinks, float scale,
            int64_t window, float* const* out) {
  const Task task{cache, pages, head, rows, positions, sinks, scale, window};
  switch (cache.format) {
    case CacheFormat::kF32: return attend_with<State<CacheFormat::kF32>>(task, queries, out);
    case CacheFormat::kBf16: return attend_with<State<CacheFormat::kBf16>>(task, queries, out);
    case CacheFormat::kInt4:
      return attend_int4(cache, pages, head, rows, queries, positions, sinks, scale, window, out);
    case CacheFormat::kInt8: return attend_with<State<CacheFormat::kInt8>>(task, queries, out);
  }
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
