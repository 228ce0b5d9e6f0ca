// Sixteen lanes on AVX512 with VNNI, and bfloat16 products where the processor has them.
// Included by simd.h, inside the namespace of one instruction set.

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;   // 16 lanes of four bytes
using Signed = __m512i;  // the same, offset by 128
using Mask = __mmask16;

inline Mask first_lanes(int64_t count) {
  return count >= 16 ? Mask(0xffff) : static_cast<Mask>((1u << count) - 1);
}

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats set1(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Floats x, int64_t count) {
  if (count >= 16) return store(p, x);
  _mm512_mask_storeu_ps(p, first_lanes(count), x);
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
}
inline Floats round(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n, n whole.
inline Floats scale_by_power(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
inline float sum_lanes(Floats a) { return _mm512_reduce_add_ps(a); }
inline float max_lanes(Floats a) { return _mm512_reduce_max_ps(a); }

inline Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Floats keep(Mask mask, Floats a) { return _mm512_maskz_mov_ps(mask, a); }
inline Floats choose(Mask mask, Floats a, Floats b) { return _mm512_mask_mov_ps(b, mask, a); }
inline uint32_t bits(Mask mask) { return mask; }
// The lanes whose bit is set; the lowest 16 count.
inline Mask lanes_of(uint32_t set) { return static_cast<Mask>(set); }

inline Floats load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_half(uint16_t* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Ints set1_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline int32_t sum_lanes(Ints a) { return _mm512_reduce_add_epi32(a); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
// Saturated to int8.
inline void store_int8(int8_t* p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x));
}

inline Floats as_floats(Bytes x) { return _mm512_castsi512_ps(x); }
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes broadcast4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
// What a byte's neighbour shifts into it is left there.
template <int kShift>
inline Bytes shift_right(Bytes a) {
  return _mm512_srli_epi16(a, kShift);
}
template <int kShift, int kBits>
inline Bytes field(Bytes a) {
  const Bytes low = _mm512_set1_epi8((1 << kBits) - 1);
  return _mm512_and_si512(kShift ? shift_right<kShift>(a) : a, low);
}
// `table[x]` of every byte, which is below 16.
inline Bytes lookup(const uint8_t* table, Bytes x) {
  const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(one), x);
}
inline Floats load_whole(const uint8_t* p) {
  return to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Powers of two by their exponents plus 127; 0 in place of 2^-127.
inline Floats load_exponents(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23));
}
// A sum as of now: else GCC copies and stores the sums of some loops.
inline Ints now(Ints sum) {
#if !defined(RYZANSTEIN_EMULATE)
  __asm__("" : "+v"(sum));
#endif
  return sum;
}
// sum + four products of small unsigned bytes (at most 127) and signed bytes.
inline Ints dot_small(Ints sum, Bytes small, Bytes x) {
  return now(_mm512_dpbusd_epi32(sum, small, x));
}
// As dot_small, for int8 weights stored with an offset of 128. A sum begins at `start_signed` of -128 times
// the sum of the activations.
inline Signed load_signed(const void* p) { return _mm512_loadu_si512(p); }
inline Ints start_signed(const int32_t* offset) { return _mm512_set1_epi32(*offset); }
inline Ints dot_signed(Ints sum, Signed weights, Bytes x) {
  return now(_mm512_dpbusd_epi32(sum, weights, x));
}

// The first `count` of every lane's elements of `size` bytes, zero for the others.
inline Bytes first_elements(Bytes x, int64_t count, int64_t size) {
  return _mm512_and_si512(x, _mm512_set1_epi32((1 << 8 * count * size) - 1));
}

#if defined(RYZANSTEIN_AVX512BF16)
// What pairs are multiplied with.
using PairValue = uint16_t;
using Pairs = __m512i;  // 16 lanes of two bfloat16
inline Pairs as_pairs(Bytes x) { return x; }
inline Pairs broadcast_pair(const uint16_t* p) { return broadcast4(p); }
inline Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
inline void store_bf16(uint16_t* p, Floats x, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(x));
}
#else
struct Pairs {  // widened
  Floats even, odd;
};
inline Pairs as_pairs(Bytes raw) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000))))};
}
using PairValue = float;  // widened once, not at each product
inline Pairs broadcast_pair(const float* p) { return {set1(p[0]), set1(p[1])}; }
inline Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
  return fma(a.odd, b.odd, fma(a.even, b.even, sum));
}
inline void store_bf16(uint16_t* p, Floats x, int64_t count) {
  const __m512i raw = _mm512_castps_si512(x);
  const __m512i lowest = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(raw, _mm512_set1_epi32(0x7fff)), lowest);
  const __m512i quiet = _mm512_or_si512(raw, _mm512_set1_epi32(0x400000));
  const __m512i wide =
      _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_mask_storeu_epi16(p, first_lanes(count),
                           _mm512_cvtepi32_epi16(_mm512_srli_epi32(wide, 16)));
}
#endif
