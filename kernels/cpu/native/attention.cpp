// Paged attention with an online softmax (arXiv 2205.14135) in blocks of 256 positions, counted from
// the sequence's start, so that a row's sums never depend on which rows share its pass.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "vector_math.h"

namespace ryzanstein {
namespace {

constexpr int kBlock = 256;
constexpr int kPass = 12;  // rows that share a pass over keys or values

inline __m512i broadcast4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// scores[r][0..16) = q[r] . keys of 16 tokens
template <int R>
void score_tile(const uint16_t* keys, int64_t dim, const uint16_t* const* queries, float scale,
                float* scores, int64_t stride) {
  __m512 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += 2) {
    const __m512i k = _mm512_load_si512(keys + i * 16);
    for (int r = 0; r < R; ++r) {
      sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)k, (__m512bh)broadcast4(queries[r] + i));
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(scores + r * stride, _mm512_mul_ps(sum[r], _mm512_set1_ps(scale)));
  }
}

// acc[r][16 dims] += sum over tokens of weights[r][t] * values[t][16 dims]
template <int R>
void value_tile(const uint16_t* values, int64_t dim, const float* weights, int64_t stride,
                int64_t tokens, float* acc, int64_t acc_stride) {
  __m512 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = _mm512_loadu_ps(acc + r * acc_stride);
  for (int64_t t = 0; t < tokens; ++t) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + t * dim));
    const __m512 v =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
    for (int r = 0; r < R; ++r) {
      sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(weights[r * stride + t]), v, sum[r]);
    }
  }
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(acc + r * acc_stride, sum[r]);
}

using ScoreTile = void (*)(const uint16_t*, int64_t, const uint16_t* const*, float, float*, int64_t);
using ValueTile = void (*)(const uint16_t*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
constexpr ScoreTile kScore[kPass + 1] = {
    nullptr,       score_tile<1>,  score_tile<2>,  score_tile<3>, score_tile<4>,
    score_tile<5>, score_tile<6>,  score_tile<7>,  score_tile<8>, score_tile<9>,
    score_tile<10>, score_tile<11>, score_tile<12>,
};
constexpr ValueTile kValue[kPass + 1] = {
    nullptr,       value_tile<1>,  value_tile<2>,  value_tile<3>, value_tile<4>,
    value_tile<5>, value_tile<6>,  value_tile<7>,  value_tile<8>, value_tile<9>,
    value_tile<10>, value_tile<11>, value_tile<12>,
};

// Softmax weights of one row's block in place; returns what older sums have to be multiplied by.
float soften(float* scores, int64_t count, int64_t from, int64_t to, float* maximum, float* total) {
  const float lowest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < std::min(from, count); ++i) scores[i] = lowest;
  for (int64_t i = std::max<int64_t>(to, 0); i < count; ++i) scores[i] = lowest;
  __m512 largest = _mm512_set1_ps(lowest);
  for (int64_t i = 0; i < count; i += 16) {
    largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + i));
  }
  const float block = _mm512_reduce_max_ps(largest);
  const float now = std::max(*maximum, block);
  if (block == lowest) {
    std::memset(scores, 0, static_cast<size_t>(count) * sizeof(float));
    return 1.0f;
  }
  const __m512 offset = _mm512_set1_ps(now);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 s = _mm512_loadu_ps(scores + i);
    const __mmask16 visible = _mm512_cmp_ps_mask(s, _mm512_set1_ps(lowest), _CMP_GT_OQ);
    const __m512 e = _mm512_maskz_mov_ps(visible, exp512(_mm512_sub_ps(s, offset)));
    _mm512_storeu_ps(scores + i, e);
    sum = _mm512_add_ps(sum, e);
  }
  const float correction = *maximum == lowest
                               ? 0.0f
                               : _mm512_cvtss_f32(exp512(_mm512_set1_ps(*maximum - now)));
  *total = *total * correction + _mm512_reduce_add_ps(sum);
  *maximum = now;
  return correction;
}

}  // namespace

void write_key(const LayerCache& cache, int64_t slot, int64_t head, const float* key) {
  const int64_t page = slot / cache.page_size, token = slot % cache.page_size;
  uint16_t* out = cache.keys + page * cache.page_elements() +
                  head * cache.page_size * cache.dim + token / 16 * 16 * cache.dim + token % 16 * 2;
  uint16_t narrow[kMaxDim];
  to_bf16_row(key, cache.dim, narrow);
  for (int64_t i = 0; i < cache.dim; i += 2) std::memcpy(out + i * 16, narrow + i, 4);
}

void write_value(const LayerCache& cache, int64_t slot, int64_t head, const float* value) {
  const int64_t page = slot / cache.page_size, token = slot % cache.page_size;
  to_bf16_row(value, cache.dim,
              cache.values + page * cache.page_elements() +
                  (head * cache.page_size + token) * cache.dim);
}

void attend(const LayerCache& cache, const int32_t* pages, int64_t head, int rows,
            const uint16_t* const* queries, const int64_t* positions, float scale, int64_t window,
            float* const* out) {
  alignas(64) static thread_local float scores[kQueryRows * kBlock];
  alignas(64) static thread_local float acc[kQueryRows * kMaxDim];
  float maximum[kQueryRows], total[kQueryRows];
  const int64_t dim = cache.dim, head_elements = cache.page_size * dim;
  for (int r = 0; r < rows; ++r) {
    maximum[r] = -std::numeric_limits<float>::infinity();
    total[r] = 0.0f;
    std::memset(acc + r * kMaxDim, 0, static_cast<size_t>(dim) * sizeof(float));
  }
  const int64_t last = *std::max_element(positions, positions + rows) + 1;
  const int64_t lowest = *std::min_element(positions, positions + rows);
  const int64_t begin = window > 0 ? std::max<int64_t>(0, lowest - window + 1) : 0;
  for (int64_t base = begin / kBlock * kBlock; base < last; base += kBlock) {
    const int64_t tokens = std::min<int64_t>(kBlock, last - base);
    const int64_t tiles = (tokens + 15) / 16;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t at = base + tile * 16;
      const uint16_t* keys = cache.keys + pages[at / cache.page_size] * cache.page_elements() +
                             head * head_elements + at % cache.page_size * dim;
      for (int first = 0; first < rows; first += kPass) {
        const int count = std::min(kPass, rows - first);
        kScore[count](keys, dim, queries + first, scale, scores + first * kBlock + tile * 16,
                      kBlock);
      }
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t from = window > 0 ? positions[r] - window + 1 - base : 0;
      const float correction = soften(scores + r * kBlock, tiles * 16, from,
                                      positions[r] + 1 - base, maximum + r, total + r);
      if (correction != 1.0f) {
        const __m512 factor = _mm512_set1_ps(correction);
        for (int64_t i = 0; i < dim; i += 16) {
          float* a = acc + r * kMaxDim + i;
          _mm512_storeu_ps(a, _mm512_mul_ps(_mm512_loadu_ps(a), factor));
        }
      }
    }
    for (int64_t t = 0; t < tokens; t += cache.page_size) {
      const uint16_t* values = cache.values +
                               pages[(base + t) / cache.page_size] * cache.page_elements() +
                               head * head_elements;
      const int64_t here = std::min(cache.page_size, tokens - t);
      for (int first = 0; first < rows; first += kPass) {
        const int count = std::min(kPass, rows - first);
        for (int64_t i = 0; i < dim; i += 16) {
          kValue[count](values + i, dim, scores + first * kBlock + t, kBlock, here,
                        acc + first * kMaxDim + i, kMaxDim);
        }
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(1.0f / total[r]);
    for (int64_t i = 0; i < dim; i += 16) {
      const __mmask16 mask = static_cast<__mmask16>(dim - i >= 16 ? 0xffff : (1 << (dim - i)) - 1);
      const __m512 mean = _mm512_mul_ps(_mm512_loadu_ps(acc + r * kMaxDim + i), inverse);
      _mm512_mask_storeu_ps(out[r] + i, mask, mean);
    }
  }
}

}  // namespace ryzanstein
