// Matmuls on packed weights. AVX512-VNNI multiplies unsigned weight bytes by signed activation
// bytes, four inputs at a time into 16 lanes, one lane per output row.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace ryzanstein {
namespace {

// Tiles and rows that share a pass: every broadcast activation feeds two tiles, every weight six
// rows, and the sums still fit the registers.
constexpr int kPassTiles = 2;
constexpr int kPassRows = 6;

inline __m512i broadcast4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

inline __m512 half16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

template <int T, int R>
void q4_pass(const Weight& w, const Quantized& x, int64_t row, int64_t tile, __m512 (&sum)[T][R]) {
  const int64_t groups = w.groups(), width = w.columns;
  const uint8_t* data = w.data.get() + tile * groups * 256;
  const uint16_t* scales = w.scales.get() + tile * groups * kTile;
  const uint16_t* minima = w.minima.get() + tile * groups * kTile;
  const int8_t* values = x.values + row * width;
  const __m512i low = _mm512_set1_epi8(0x0f);
  for (int64_t g = 0; g < groups; ++g) {
    __m512i dot[T][R];
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) dot[t][r] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i first[T], second[T];
      for (int t = 0; t < T; ++t) {
        const __m512i packed = _mm512_load_si512(data + (t * groups + g) * 256 + 64 * j);
        first[t] = _mm512_and_si512(packed, low);
        second[t] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
      }
      for (int r = 0; r < R; ++r) {
        const int8_t* v = values + r * width + g * kGroup + 4 * j;
        const __m512i a = broadcast4(v), b = broadcast4(v + 16);
        for (int t = 0; t < T; ++t) {
          dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], first[t], a);
          dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], second[t], b);
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const __m512 scale = half16(scales + (t * groups + g) * kTile);
      const __m512 minimum = half16(minima + (t * groups + g) * kTile);
      for (int r = 0; r < R; ++r) {
        const int64_t at = (row + r) * groups + g;
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[at]));
        sum[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][r]), factor, sum[t][r]);
        sum[t][r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x.sums[at]), sum[t][r]);
      }
    }
  }
}

template <int T, int R>
void q8_pass(const Weight& w, const Quantized& x, int64_t row, int64_t tile, __m512 (&sum)[T][R]) {
  const int64_t groups = w.groups(), width = w.columns;
  const uint8_t* data = w.data.get() + tile * groups * 512;
  const uint16_t* scales = w.scales.get() + tile * groups * kTile;
  const int8_t* values = x.values + row * width;
  for (int64_t g = 0; g < groups; ++g) {
    __m512i dot[T][R];
    for (int r = 0; r < R; ++r) {
      // Weight bytes are offset by 128; starting at -128 * sum(x) takes that out exactly.
      const __m512i start = _mm512_set1_epi32(x.counts[(row + r) * groups + g]);
      for (int t = 0; t < T; ++t) dot[t][r] = start;
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m512i packed[T];
      for (int t = 0; t < T; ++t) {
        packed[t] = _mm512_load_si512(data + (t * groups + g) * 512 + 64 * j);
      }
      for (int r = 0; r < R; ++r) {
        const __m512i v = broadcast4(values + r * width + g * kGroup + 4 * j);
        for (int t = 0; t < T; ++t) dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], packed[t], v);
      }
    }
    for (int t = 0; t < T; ++t) {
      const __m512 scale = half16(scales + (t * groups + g) * kTile);
      for (int r = 0; r < R; ++r) {
        const __m512 one = _mm512_set1_ps(x.scales[(row + r) * groups + g]);
        sum[t][r] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][r]), _mm512_mul_ps(scale, one), sum[t][r]);
      }
    }
  }
}

template <int T, int R>
void bf16_pass(const Weight& w, const Quantized& x, int64_t row, int64_t tile,
               __m512 (&sum)[T][R]) {
  const int64_t width = w.columns;
  const uint8_t* data = w.data.get() + tile * width * kTile * 2;
  const uint16_t* values = x.bf16 + row * width;
  for (int64_t i = 0; i < width; i += 2) {
    __m512i packed[T];
    for (int t = 0; t < T; ++t) {
      packed[t] = _mm512_load_si512(data + (t * width + i) * kTile * 2);
    }
    for (int r = 0; r < R; ++r) {
      const __m512i v = broadcast4(values + r * width + i);
      for (int t = 0; t < T; ++t) {
        sum[t][r] = _mm512_dpbf16_ps(sum[t][r], (__m512bh)packed[t], (__m512bh)v);
      }
    }
  }
}

template <int T, int R>
void pass(const Weight& w, const Quantized& x, int64_t row, int64_t tile, const float* bias,
          float* y) {
  __m512 sum[T][R];
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) sum[t][r] = _mm512_setzero_ps();
  }
  switch (w.format) {
    case Format::kQ4: q4_pass<T, R>(w, x, row, tile, sum); break;
    case Format::kQ8: q8_pass<T, R>(w, x, row, tile, sum); break;
    case Format::kBf16: bf16_pass<T, R>(w, x, row, tile, sum); break;
  }
  for (int t = 0; t < T; ++t) {
    const int64_t out = (tile + t) * kTile;
    const int64_t valid = w.rows - out < kTile ? w.rows - out : kTile;
    const __mmask16 mask = static_cast<__mmask16>((1u << valid) - 1);
    const __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + out) : _mm512_setzero_ps();
    for (int r = 0; r < R; ++r) {
      const __m512 total = bias ? _mm512_add_ps(sum[t][r], added) : sum[t][r];
      _mm512_mask_storeu_ps(y + (row + r) * w.rows + out, mask, total);
    }
  }
}

using Pass = void (*)(const Weight&, const Quantized&, int64_t, int64_t, const float*, float*);
constexpr Pass kPass[kPassTiles + 1][kPassRows + 1] = {
    {},
    {nullptr, pass<1, 1>, pass<1, 2>, pass<1, 3>, pass<1, 4>, pass<1, 5>, pass<1, 6>},
    {nullptr, pass<2, 1>, pass<2, 2>, pass<2, 3>, pass<2, 4>, pass<2, 5>, pass<2, 6>},
};

}  // namespace

void matmul(const Weight& w, const Quantized& x, int64_t rows, const float* bias, float* y,
            int64_t first, int64_t last) {
  // Passes of nearly equal size: 8 rows are 4 + 4, not 6 + 2.
  const int64_t passes = (rows + kPassRows - 1) / kPassRows;
  for (int64_t tile = first; tile < last; tile += kPassTiles) {
    const int64_t tiles = last - tile < kPassTiles ? last - tile : kPassTiles;
    for (int64_t n = 0, row = 0; n < passes; ++n) {
      const int64_t count = (rows - row + passes - n - 1) / (passes - n);
      kPass[tiles][count](w, x, row, tile, bias, y);
      row += count;
    }
  }
}

}  // namespace ryzanstein
