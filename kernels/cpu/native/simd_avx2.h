// Sixteen lanes as two registers of AVX2 with FMA and F16C, and byte products of AVX-VNNI where
// RYZANSTEIN_AVXVNNI is defined.
// Included by simd.h, inside the namespace of one instruction set.

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};
using Bytes = Ints;  // 16 lanes of four bytes
using Mask = Floats;  // all bits of a lane, or none

inline __m256i lane_mask(int64_t count) {
  alignas(32) static const int32_t table[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                0,  0,  0,  0,  0,  0,  0,  0};
  const int64_t lanes = count < 0 ? 0 : count > 8 ? 8 : count;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + 8 - lanes));
}

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const float* p, int64_t count) {
  if (count >= 16) return load(p);
  return {_mm256_maskload_ps(p, lane_mask(count)), _mm256_maskload_ps(p + 8, lane_mask(count - 8))};
}
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store(float* p, Floats x, int64_t count) {
  if (count >= 16) return store(p, x);
  _mm256_maskstore_ps(p, lane_mask(count), x.a);
  _mm256_maskstore_ps(p + 8, lane_mask(count - 8), x.b);
}
inline Floats add(Floats x, Floats y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline Floats sub(Floats x, Floats y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline Floats mul(Floats x, Floats y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline Floats div(Floats x, Floats y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats fnma(Floats x, Floats y, Floats z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline Floats max(Floats x, Floats y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
inline Floats min(Floats x, Floats y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
inline Floats abs(Floats x) {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, all), _mm256_and_ps(x.b, all)};
}
inline Floats round(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline __m256 scale_by_power(__m256 x, __m256 n) {
  // In two steps, since 2^n itself may be too small for a float.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)),
                       power_of_two(_mm256_sub_epi32(whole, half)));
}
// x * 2^n, n whole.
inline Floats scale_by_power(Floats x, Floats n) {
  return {scale_by_power(x.a, n.a), scale_by_power(x.b, n.b)};
}
inline float sum_lanes(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Mask greater(Floats x, Floats y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
inline Mask at_least(Floats x, Floats y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)};
}
inline Mask equal(Floats x, Floats y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)};
}
inline Floats keep(Mask mask, Floats x) {
  return {_mm256_and_ps(mask.a, x.a), _mm256_and_ps(mask.b, x.b)};
}
inline Floats choose(Mask mask, Floats x, Floats y) {
  return {_mm256_blendv_ps(y.a, x.a, mask.a), _mm256_blendv_ps(y.b, x.b, mask.b)};
}
inline uint32_t bits(Mask mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(mask.a)) |
         static_cast<uint32_t>(_mm256_movemask_ps(mask.b)) << 8;
}
// The lanes whose bit is set; the lowest 16 count.
inline Mask lanes_of(uint32_t set) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(set));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, high), high))};
}

inline Floats load_half(const uint16_t* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline void store_half(uint16_t* p, Floats x) {
  auto* halves = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(halves, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline Ints set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints add(Ints x, Ints y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline int32_t sum_lanes(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
// Saturated to int8.
inline void store_int8(int8_t* p, Ints x) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves),
                                        _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline Floats as_floats(Bytes x) {
  return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}
inline Bytes load_bytes(const void* p) {
  const auto* registers = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(registers), _mm256_loadu_si256(registers + 1)};
}
inline Bytes broadcast4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return set1_int(word);
}
// What a byte's neighbour shifts into it is left there.
template <int kShift>
inline Bytes shift_right(Bytes x) {
  return {_mm256_srli_epi16(x.a, kShift), _mm256_srli_epi16(x.b, kShift)};
}
template <int kShift, int kBits>
inline Bytes field(Bytes x) {
  const __m256i low = _mm256_set1_epi8((1 << kBits) - 1);
  if (kShift) x = shift_right<kShift>(x);
  return {_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)};
}
// `table[x]` of every byte, which is below 16.
inline Bytes lookup(const uint8_t* table, Bytes x) {
  const __m256i both =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(both, x.a), _mm256_shuffle_epi8(both, x.b)};
}
inline Floats load_whole(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
// Powers of two by their exponents plus 127; 0 in place of 2^-127.
inline Floats load_exponents(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i low = _mm256_cvtepu8_epi32(bytes);
  const __m256i high = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(high, 23))};
}
// A sum as of now: else GCC collects all products of a loop before it adds any, and stores them
// meanwhile.
inline __m256i now(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}
#if defined(RYZANSTEIN_AVXVNNI)
inline __m256i dot4(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
#if defined(RYZANSTEIN_EMULATE)  // the instruction's sums by older ones, for tests on older processors
  const __m256i low = _mm256_set1_epi16(0xff);
  const __m256i even = _mm256_madd_epi16(
      _mm256_and_si256(unsigned_bytes, low),
      _mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(unsigned_bytes, 8),
                                        _mm256_srai_epi16(signed_bytes, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#else
  return now(_mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes));
#endif
}
#else
inline __m256i dot4(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
  return now(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
#endif
// sum + four products of small unsigned bytes (at most 127) and signed bytes.
inline Ints dot_small(Ints sum, Bytes small, Bytes x) {
  return {dot4(sum.a, small.a, x.a), dot4(sum.b, small.b, x.b)};
}
#if defined(RYZANSTEIN_AVXVNNI)
// As on AVX512: see simd_avx512.h.
using Signed = Bytes;  // offset by 128
inline Signed load_signed(const void* p) { return load_bytes(p); }
inline Ints start_signed(const int32_t* offset) { return set1_int(*offset); }
inline Ints dot_signed(Ints sum, Signed weights, Bytes x) { return dot_small(sum, weights, x); }
#else
// Such sums, two lanes of 16 bits in place of one of 32, which saves one of three instructions. They
// hold eight dots with bytes up to 15 (8 * 2 * 15 * 128 < 2^15), four with bytes up to 24, or
// kPartialDots with bytes up to 2.
constexpr int64_t kPartialDots = 60;
struct Partial {
  __m256i a, b;
};
inline Partial no_products() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Partial dot_partial(Partial sum, Bytes small, Bytes x) {
  return {now(_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(small.a, x.a))),
          now(_mm256_add_epi16(sum.b, _mm256_maddubs_epi16(small.b, x.b)))};
}
inline Ints widen(Partial sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(sum.a, ones), _mm256_madd_epi16(sum.b, ones)};
}
// A sum that begins at a number which 16 bits may not hold: it is added at the end.
inline Partial products_from(const int32_t*) { return no_products(); }
inline Ints products_of(Partial sum, const int32_t* start) { return add(widen(sum), set1_int(*start)); }
// As dot_small, for int8 weights stored with an offset of 128. A sum begins at `start_signed` of -128 times
// the sum of the activations.
// Magnitudes times sign-adjusted activations stay within 16 bits; offset bytes would not.
struct Signed {  // magnitudes, and the signed values
  Bytes size, value;
};
inline Signed load_signed(const void* p) {
  const __m256i offset = _mm256_set1_epi8(-128);
  Bytes value = load_bytes(p);
  value = {_mm256_xor_si256(value.a, offset), _mm256_xor_si256(value.b, offset)};
  return {{_mm256_abs_epi8(value.a), _mm256_abs_epi8(value.b)}, value};
}
inline Ints start_signed(const int32_t*) { return set1_int(0); }
inline Ints dot_signed(Ints sum, Signed weights, Bytes x) {
  return {dot4(sum.a, weights.size.a, _mm256_sign_epi8(x.a, weights.value.a)),
          dot4(sum.b, weights.size.b, _mm256_sign_epi8(x.b, weights.value.b))};
}
#endif

// The first `count` of every lane's elements of `size` bytes, zero for the others.
inline Bytes first_elements(Bytes x, int64_t count, int64_t size) {
  const __m256i mask = _mm256_set1_epi32((1 << 8 * count * size) - 1);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}

struct Pairs {  // 16 lanes of two bfloat16, widened
  Floats even, odd;
};
inline Pairs as_pairs(Bytes raw) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(raw.a, 16)),
           _mm256_castsi256_ps(_mm256_slli_epi32(raw.b, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(raw.a, upper)),
           _mm256_castsi256_ps(_mm256_and_si256(raw.b, upper))}};
}
using PairValue = float;  // widened once, not at each product
inline Pairs broadcast_pair(const float* p) { return {set1(p[0]), set1(p[1])}; }
inline Floats dot_pairs(Floats sum, Pairs x, Pairs y) {
  return fma(x.odd, y.odd, fma(x.even, y.even, sum));
}
inline __m256i round_to_bf16(__m256 x) {
  const __m256i raw = _mm256_castps_si256(x);
  const __m256i lowest = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(raw, _mm256_set1_epi32(0x7fff)), lowest);
  const __m256i quiet = _mm256_or_si256(raw, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}
inline void store_bf16(uint16_t* p, Floats x, int64_t count) {
  alignas(32) uint16_t rounded[16];
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(x.a), round_to_bf16(x.b));
  _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), _mm256_permute4x64_epi64(packed, 0xd8));
  std::memcpy(p, rounded, static_cast<size_t>(count < 16 ? count : 16) * 2);
}
