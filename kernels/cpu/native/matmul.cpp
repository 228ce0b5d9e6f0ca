// Matmuls on packed weights. AVX512-VNNI multiplies unsigned weight bytes by signed activation
// bytes, four inputs at a time into 16 lanes, one lane per output row.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace ryzanstein {
namespace {

constexpr int kMaxRows = 12;  // rows that share a pass over a tile: two registers each

inline __m512i broadcast4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

inline __m512 half16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}

template <int R>
void q4_tile(const Weight& w, const Quantized& x, int64_t row, int64_t tile, __m512* sum) {
  const int64_t groups = w.groups(), width = w.columns;
  const uint8_t* data = w.data.get() + tile * groups * 256;
  const uint16_t* scales = w.scales.get() + tile * groups * kTile;
  const uint16_t* minima = w.minima.get() + tile * groups * kTile;
  const int8_t* values = x.values + row * width;
  const __m512i low = _mm512_set1_epi8(0x0f);
  for (int64_t g = 0; g < groups; ++g) {
    __m512i dot[R];
    for (int r = 0; r < R; ++r) dot[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i packed = _mm512_load_si512(data + g * 256 + 64 * j);
      const __m512i first = _mm512_and_si512(packed, low);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
      for (int r = 0; r < R; ++r) {
        const int8_t* v = values + r * width + g * kGroup + 4 * j;
        dot[r] = _mm512_dpbusd_epi32(dot[r], first, broadcast4(v));
        dot[r] = _mm512_dpbusd_epi32(dot[r], second, broadcast4(v + 16));
      }
    }
    const __m512 scale = half16(scales + g * kTile), minimum = half16(minima + g * kTile);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * groups + g;
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[at]));
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), factor, sum[r]);
      sum[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x.sums[at]), sum[r]);
    }
  }
}

template <int R>
void q8_tile(const Weight& w, const Quantized& x, int64_t row, int64_t tile, __m512* sum) {
  const int64_t groups = w.groups(), width = w.columns;
  const uint8_t* data = w.data.get() + tile * groups * 512;
  const uint16_t* scales = w.scales.get() + tile * groups * kTile;
  const int8_t* values = x.values + row * width;
  for (int64_t g = 0; g < groups; ++g) {
    __m512i dot[R];
    // Weight bytes are offset by 128; starting at -128 * sum(x) takes that out exactly.
    for (int r = 0; r < R; ++r) dot[r] = _mm512_set1_epi32(x.counts[(row + r) * groups + g]);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i packed = _mm512_load_si512(data + g * 512 + 64 * j);
      for (int r = 0; r < R; ++r) {
        const int8_t* v = values + r * width + g * kGroup + 4 * j;
        dot[r] = _mm512_dpbusd_epi32(dot[r], packed, broadcast4(v));
      }
    }
    const __m512 scale = half16(scales + g * kTile);
    for (int r = 0; r < R; ++r) {
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[(row + r) * groups + g]));
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), factor, sum[r]);
    }
  }
}

template <int R>
void bf16_tile(const Weight& w, const Quantized& x, int64_t row, int64_t tile, __m512* sum) {
  const int64_t width = w.columns;
  const uint8_t* data = w.data.get() + tile * width * kTile * 2;
  const uint16_t* values = x.bf16 + row * width;
  for (int64_t i = 0; i < width; i += 2) {
    const __m512i packed = _mm512_load_si512(data + i * kTile * 2);
    for (int r = 0; r < R; ++r) {
      const __m512i v = broadcast4(values + r * width + i);
      sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)packed, (__m512bh)v);
    }
  }
}

template <int R>
void rows_tile(const Weight& w, const Quantized& x, int64_t row, int64_t tile, const float* bias,
               float* y) {
  __m512 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
  switch (w.format) {
    case Format::kQ4: q4_tile<R>(w, x, row, tile, sum); break;
    case Format::kQ8: q8_tile<R>(w, x, row, tile, sum); break;
    case Format::kBf16: bf16_tile<R>(w, x, row, tile, sum); break;
  }
  const int64_t out = tile * kTile;
  const int64_t valid = w.rows - out < kTile ? w.rows - out : kTile;
  const __mmask16 mask = static_cast<__mmask16>((1u << valid) - 1);
  const __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + out) : _mm512_setzero_ps();
  for (int r = 0; r < R; ++r) {
    const __m512 total = bias ? _mm512_add_ps(sum[r], added) : sum[r];
    _mm512_mask_storeu_ps(y + (row + r) * w.rows + out, mask, total);
  }
}

using RowsTile = void (*)(const Weight&, const Quantized&, int64_t, int64_t, const float*, float*);
constexpr RowsTile kRowsTile[kMaxRows + 1] = {
    nullptr,       rows_tile<1>, rows_tile<2>,  rows_tile<3>,  rows_tile<4>,
    rows_tile<5>,  rows_tile<6>, rows_tile<7>,  rows_tile<8>,  rows_tile<9>,
    rows_tile<10>, rows_tile<11>, rows_tile<12>,
};

}  // namespace

void matmul(const Weight& w, const Quantized& x, int64_t rows, const float* bias, float* y,
            int64_t first, int64_t last) {
  // Passes of nearly equal size: 16 rows are 8 + 8, not 12 + 4.
  const int64_t passes = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t tile = first; tile < last; ++tile) {
    for (int64_t pass = 0, row = 0; pass < passes; ++pass) {
      const int64_t count = (rows - row + passes - pass - 1) / (passes - pass);
      kRowsTile[count](w, x, row, tile, bias, y);
      row += count;
    }
  }
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace ryzanstein
