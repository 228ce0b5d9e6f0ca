// What simd_avx512.h takes of AVX512, lane by lane in plain C++, so that its kernels can be tested on
// processors that lack it; never for use. Included by simd.h, inside the namespace of one set.

struct WideFloats {
  float v[16];
};
struct WideInts {
  int32_t v[16];
};
#define __m512 WideFloats
#define __m512i WideInts
#define __m512bh WideInts

template <class Lane>
inline WideFloats floats_of(const Lane& lane) {
  WideFloats out;
  for (int i = 0; i < 16; ++i) out.v[i] = lane(i);
  return out;
}
template <class Lane>
inline WideInts ints_of(const Lane& lane) {
  WideInts out;
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<int32_t>(lane(i));
  return out;
}
template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline bool in_mask(uint16_t mask, int lane) { return mask >> lane & 1; }
inline uint32_t unsigned_of(int32_t x) { return static_cast<uint32_t>(x); }

#define LANES2(name, Type, make, expression)             \
  inline Type emulated_##name(Type a, Type b) {          \
    return make([&](int i) { return (expression); });    \
  }
LANES2(add_ps, WideFloats, floats_of, a.v[i] + b.v[i])
LANES2(sub_ps, WideFloats, floats_of, a.v[i] - b.v[i])
LANES2(mul_ps, WideFloats, floats_of, a.v[i] * b.v[i])
LANES2(div_ps, WideFloats, floats_of, a.v[i] / b.v[i])
LANES2(max_ps, WideFloats, floats_of, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
LANES2(min_ps, WideFloats, floats_of, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
LANES2(scalef_ps, WideFloats, floats_of, __builtin_ldexpf(a.v[i], static_cast<int>(b.v[i])))
LANES2(add_epi32, WideInts, ints_of, unsigned_of(a.v[i]) + unsigned_of(b.v[i]))
LANES2(and_si512, WideInts, ints_of, a.v[i] & b.v[i])
LANES2(or_si512, WideInts, ints_of, a.v[i] | b.v[i])
#undef LANES2

inline WideFloats emulated_set1_ps(float x) { return floats_of([&](int) { return x; }); }
inline WideFloats emulated_setzero_ps() { return emulated_set1_ps(0.0f); }
inline WideInts emulated_set1_epi32(int32_t x) { return ints_of([&](int) { return x; }); }
inline WideInts emulated_set1_epi8(int x) {
  return emulated_set1_epi32(static_cast<int32_t>(0x01010101u * static_cast<uint8_t>(x)));
}
inline WideFloats emulated_loadu_ps(const float* p) {
  return floats_of([&](int i) { return p[i]; });
}
inline WideFloats emulated_maskz_loadu_ps(uint16_t mask, const float* p) {
  return floats_of([&](int i) { return in_mask(mask, i) ? p[i] : 0.0f; });
}
inline void emulated_storeu_ps(float* p, WideFloats x) { std::memcpy(p, x.v, sizeof x.v); }
inline void emulated_mask_storeu_ps(float* p, uint16_t mask, WideFloats x) {
  for (int i = 0; i < 16; ++i) {
    if (in_mask(mask, i)) p[i] = x.v[i];
  }
}
inline WideInts emulated_loadu_si512(const void* p) {
  WideInts out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline WideFloats emulated_castsi512_ps(WideInts a) { return bits_as<WideFloats>(a); }
inline WideInts emulated_castps_si512(WideFloats a) { return bits_as<WideInts>(a); }

inline WideFloats emulated_fmadd_ps(WideFloats a, WideFloats b, WideFloats c) {
  return floats_of([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline WideFloats emulated_fnmadd_ps(WideFloats a, WideFloats b, WideFloats c) {
  return floats_of([&](int i) { return __builtin_fmaf(-a.v[i], b.v[i], c.v[i]); });
}
inline WideFloats emulated_roundscale_ps(WideFloats a, int) {
  return floats_of([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
inline float emulated_reduce_add_ps(WideFloats a) {
  // Halves upon each other, as the compiler adds them.
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
inline float emulated_reduce_max_ps(WideFloats a) {
  float most = a.v[0];
  for (float x : a.v) most = x > most ? x : most;
  return most;
}
inline int32_t emulated_reduce_add_epi32(WideInts a) {
  uint32_t sum = 0;
  for (int32_t x : a.v) sum += unsigned_of(x);
  return static_cast<int32_t>(sum);
}

inline uint16_t emulated_cmp_ps_mask(WideFloats a, WideFloats b, int kind) {
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    const float x = a.v[i], y = b.v[i];
    const bool holds = kind == _CMP_GT_OQ   ? x > y
                       : kind == _CMP_GE_OQ ? x >= y
                       : kind == _CMP_EQ_OQ ? x == y
                                            : x != x || y != y;  // _CMP_UNORD_Q
    mask = static_cast<uint16_t>(mask | holds << i);
  }
  return mask;
}
inline WideFloats emulated_mask_mov_ps(WideFloats b, uint16_t mask, WideFloats a) {
  return floats_of([&](int i) { return in_mask(mask, i) ? a.v[i] : b.v[i]; });
}
inline WideFloats emulated_maskz_mov_ps(uint16_t mask, WideFloats a) {
  return emulated_mask_mov_ps(emulated_setzero_ps(), mask, a);
}
inline WideInts emulated_mask_mov_epi32(WideInts b, uint16_t mask, WideInts a) {
  return ints_of([&](int i) { return in_mask(mask, i) ? a.v[i] : b.v[i]; });
}

inline WideFloats emulated_cvtph_ps(__m256i halves) {
  const auto words = bits_as<std::array<uint16_t, 16>>(halves);
  return floats_of([&](int i) { return _cvtsh_ss(words[static_cast<size_t>(i)]); });
}
inline __m256i emulated_cvtps_ph(WideFloats a, int) {
  std::array<uint16_t, 16> words;
  for (size_t i = 0; i < 16; ++i) words[i] = _cvtss_sh(a.v[i], _MM_FROUND_TO_NEAREST_INT);
  return bits_as<__m256i>(words);
}
inline WideFloats emulated_cvtepi32_ps(WideInts a) {
  return floats_of([&](int i) { return static_cast<float>(a.v[i]); });
}
inline WideInts emulated_cvtps_epi32(WideFloats a) {
  return ints_of([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
inline __m128i emulated_cvtsepi32_epi8(WideInts a) {
  std::array<int8_t, 16> bytes;
  for (size_t i = 0; i < 16; ++i) {
    bytes[i] = static_cast<int8_t>(a.v[i] > 127 ? 127 : a.v[i] < -128 ? -128 : a.v[i]);
  }
  return bits_as<__m128i>(bytes);
}
inline __m256i emulated_cvtepi32_epi16(WideInts a) {
  std::array<int16_t, 16> words;
  for (size_t i = 0; i < 16; ++i) words[i] = static_cast<int16_t>(a.v[i]);
  return bits_as<__m256i>(words);
}
inline WideInts emulated_cvtepu8_epi32(__m128i x) {
  const auto bytes = bits_as<std::array<uint8_t, 16>>(x);
  return ints_of([&](int i) { return bytes[static_cast<size_t>(i)]; });
}

inline WideInts emulated_slli_epi32(WideInts a, int count) {
  return ints_of([&](int i) { return unsigned_of(a.v[i]) << count; });
}
inline WideInts emulated_srli_epi32(WideInts a, int count) {
  return ints_of([&](int i) { return unsigned_of(a.v[i]) >> count; });
}
inline WideInts emulated_srli_epi16(WideInts a, int count) {
  auto words = bits_as<std::array<uint16_t, 32>>(a);
  for (uint16_t& word : words) word = static_cast<uint16_t>(word >> count);
  return bits_as<WideInts>(words);
}
inline WideInts emulated_broadcast_i32x4(__m128i x) {
  const auto words = bits_as<std::array<int32_t, 4>>(x);
  return ints_of([&](int i) { return words[static_cast<size_t>(i % 4)]; });
}
inline WideInts emulated_shuffle_epi8(WideInts table, WideInts x) {
  const auto from = bits_as<std::array<uint8_t, 64>>(table);
  auto bytes = bits_as<std::array<uint8_t, 64>>(x);
  for (size_t i = 0; i < 64; ++i) {
    bytes[i] = bytes[i] & 128 ? uint8_t{0} : from[i / 16 * 16 + (bytes[i] & 15)];
  }
  return bits_as<WideInts>(bytes);
}
inline WideInts emulated_dpbusd_epi32(WideInts sum, WideInts a, WideInts b) {
  const auto x = bits_as<std::array<uint8_t, 64>>(a);
  const auto y = bits_as<std::array<int8_t, 64>>(b);
  return ints_of([&](int i) {
    uint32_t all = unsigned_of(sum.v[i]);
    for (size_t n = static_cast<size_t>(4 * i), end = n + 4; n < end; ++n) {
      all += unsigned_of(x[n] * y[n]);
    }
    return all;
  });
}

inline float upper_half(uint32_t pair) { return bits_as<float>(pair & 0xffff0000u); }
inline WideFloats emulated_dpbf16_ps(WideFloats sum, WideInts a, WideInts b) {
  return floats_of([&](int i) {
    const uint32_t x = unsigned_of(a.v[i]), y = unsigned_of(b.v[i]);
    const float odd = sum.v[i] + upper_half(x) * upper_half(y);
    return odd + upper_half(x << 16) * upper_half(y << 16);
  });
}
inline __m256i emulated_cvtneps_pbh(WideFloats a) {
  std::array<uint16_t, 16> words;
  for (size_t i = 0; i < 16; ++i) {
    const uint32_t raw = bits_as<uint32_t>(a.v[i]);
    const uint32_t rounded = (raw + 0x7fff + (raw >> 16 & 1)) >> 16;
    words[i] = static_cast<uint16_t>(a.v[i] == a.v[i] ? rounded : raw >> 16 | 64);
  }
  return bits_as<__m256i>(words);
}
inline void emulated_mask_storeu_epi16(uint16_t* p, uint16_t mask, __m256i x) {
  const auto words = bits_as<std::array<uint16_t, 16>>(x);
  for (int i = 0; i < 16; ++i) {
    if (in_mask(mask, i)) p[i] = words[static_cast<size_t>(i)];
  }
}

// Compilers have some of these as macros.
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated_add_epi32
#undef _mm512_add_ps
#define _mm512_add_ps emulated_add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 emulated_and_si512
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 emulated_broadcast_i32x4
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated_castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated_castsi512_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated_cmp_ps_mask
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated_cvtps_ph
#undef _mm512_cvtsepi32_epi8
#define _mm512_cvtsepi32_epi8 emulated_cvtsepi32_epi8
#undef _mm512_div_ps
#define _mm512_div_ps emulated_div_ps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#undef _mm512_fnmadd_ps
#define _mm512_fnmadd_ps emulated_fnmadd_ps
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated_loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated_loadu_si512
#undef _mm512_mask_mov_epi32
#define _mm512_mask_mov_epi32 emulated_mask_mov_epi32
#undef _mm512_mask_mov_ps
#define _mm512_mask_mov_ps emulated_mask_mov_ps
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps emulated_maskz_mov_ps
#undef _mm512_max_ps
#define _mm512_max_ps emulated_max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated_min_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated_mul_ps
#undef _mm512_or_si512
#define _mm512_or_si512 emulated_or_si512
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated_roundscale_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated_scalef_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated_set1_epi32
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated_set1_epi8
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated_set1_ps
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated_setzero_ps
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated_slli_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated_srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated_srli_epi32
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated_storeu_ps
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated_sub_ps
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 emulated_mask_storeu_epi16
