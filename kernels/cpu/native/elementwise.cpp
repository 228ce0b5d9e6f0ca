// Everything that works on one row at a time. Sums run in 16 fixed lanes, then across the lanes.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "vector_math.h"

namespace ryzanstein {
namespace {

inline __mmask16 tail(int64_t left) {
  return left >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << left) - 1);
}

// Below this a group's scale has no finite inverse; such values are zero.
constexpr float kSmallest = 1e-35f;

void quantize_groups(const float* x, int64_t width, int64_t row, const Quantized& out) {
  const int64_t groups = width / kGroup;
  const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
  for (int64_t g = 0; g < groups; ++g) {
    const __m512 a = _mm512_loadu_ps(x + g * kGroup), b = _mm512_loadu_ps(x + g * kGroup + 16);
    const __m512 abs_a = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), absolute));
    const __m512 abs_b = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(b), absolute));
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(abs_a, abs_b));
    if (largest < kSmallest) largest = 0.0f;
    const float scale = largest / 127.0f;
    const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    const __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
    const __m512i qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
    int8_t* values = out.values + row * width + g * kGroup;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtsepi32_epi8(qa));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + 16), _mm512_cvtsepi32_epi8(qb));
    const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
    out.scales[row * groups + g] = scale;
    out.sums[row * groups + g] = scale * static_cast<float>(sum);
    out.counts[row * groups + g] = -128 * sum;
  }
}

}  // namespace

void quantize_row(const float* x, int64_t width, int64_t row, const Quantized& out) {
  if (out.values) quantize_groups(x, width, row, out);
  if (out.bf16) to_bf16_row(x, width, out.bf16 + row * width);
}

void to_bf16_row(const float* x, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = tail(width - i);
    const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i));
    _mm256_mask_storeu_epi16(out + i, mask, (__m256i)narrow);
  }
}

void embed_row(const Weight& table, int64_t index, float scale, float* out) {
  const int64_t groups = table.groups(), width = table.columns;
  const int64_t tile = index / kTile, lane = index % kTile;
  if (table.format == Format::kBf16) {
    const auto* data = reinterpret_cast<const uint16_t*>(table.data.get());
    data += tile * width * kTile + lane * 2;
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t bits = uint32_t{data[i / 2 * kTile * 2 + i % 2]} << 16;
      std::memcpy(out + i, &bits, 4);
      out[i] *= scale;
    }
    return;
  }
  const bool q4 = table.format == Format::kQ4;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t place = tile * groups + g;
    const uint8_t* block = table.data.get() + place * (q4 ? 256 : 512) + 4 * lane;
    const float d = _cvtsh_ss(table.scales[place * kTile + lane]);
    const float m = q4 ? _cvtsh_ss(table.minima[place * kTile + lane]) : 0.0f;
    for (int i = 0; i < kGroup; ++i) {
      float value;
      if (q4) {
        const int byte = block[64 * (i % 16 / 4) + i % 4];
        value = d * static_cast<float>(i < 16 ? byte & 15 : byte >> 4) + m;
      } else {
        value = d * static_cast<float>(block[64 * (i / 4) + i % 4] - 128);
      }
      out[g * kGroup + i] = value * scale;
    }
  }
}

void rms_norm_row(const float* x, const float* weight, float eps, int64_t width, float* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(tail(width - i), x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = tail(width - i);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
    const __m512 w = _mm512_maskz_loadu_ps(mask, weight + i);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(v, w));
  }
}

void add_row(const float* a, const float* b, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = tail(width - i);
    const __m512 sum =
        _mm512_add_ps(_mm512_maskz_loadu_ps(mask, a + i), _mm512_maskz_loadu_ps(mask, b + i));
    _mm512_mask_storeu_ps(out + i, mask, sum);
  }
}

void gated_row(const float* x, int64_t width, int activation, float* out) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = tail(width - i);
    const __m512 gate = _mm512_maskz_loadu_ps(mask, x + i);
    const __m512 up = _mm512_maskz_loadu_ps(mask, x + width + i);
    __m512 argument = gate;
    if (activation == 1) {
      // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (g + 0.044715 g^3)
      const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(gate, gate), gate);
      const __m512 inner = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, gate);
      argument = _mm512_mul_ps(_mm512_set1_ps(1.5957691216f), inner);
    }
    const __m512 negative = _mm512_sub_ps(_mm512_setzero_ps(), argument);
    const __m512 sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, exp512(negative)));
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), up));
  }
}

void rotate_head(float* head, const float* cosine, const float* sine, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = tail(half - i);
    const __m512 low = _mm512_maskz_loadu_ps(mask, head + i);
    const __m512 high = _mm512_maskz_loadu_ps(mask, head + half + i);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cosine + i);
    const __m512 s = _mm512_maskz_loadu_ps(mask, sine + i);
    const __m512 first = _mm512_sub_ps(_mm512_mul_ps(low, c), _mm512_mul_ps(high, s));
    const __m512 second = _mm512_add_ps(_mm512_mul_ps(high, c), _mm512_mul_ps(low, s));
    _mm512_mask_storeu_ps(head + i, mask, first);
    _mm512_mask_storeu_ps(head + half + i, mask, second);
  }
}

}  // namespace ryzanstein
