// Vectors on their way into a page of the cache, and back.
#include "rounding.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

constexpr int64_t kGroup = 32;
constexpr float kMostHalf = 65504.0f;

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

// One element of a cache of kF32 or kBf16.
float to_float(CacheFormat format, const uint8_t* at) {
  uint32_t raw = 0;
  if (format == CacheFormat::kF32) {
    std::memcpy(&raw, at, 4);
  } else {
    uint16_t bf16;
    std::memcpy(&bf16, at, 2);
    raw = static_cast<uint32_t>(bf16) << 16;
  }
  float x;
  std::memcpy(&x, &raw, sizeof x);
  return x;
}

float half_to_float(const uint16_t* half) {
  alignas(32) uint16_t halves[16] = {*half};
  alignas(64) float lanes[16];
  store(lanes, load_half(halves));
  return lanes[0];
}

// x rounded to fp16, which `half` becomes.
float round_to_half(float x, uint16_t* half) {
  alignas(32) uint16_t halves[16];
  store_half(halves, set1(x > kMostHalf ? kMostHalf : x < -kMostHalf ? -kMostHalf : x));
  *half = halves[0];
  return half_to_float(half);
}

// Rounds 32 values to 0..15 under the scale and lowest value (16 further) that are left in `scale`.
void round_to_int4(const float* x, uint8_t* out, uint16_t* scale) {
  const Floats a = load(x), b = load(x + 16);
  const float highest = max_lanes(max(a, b));
  const float least = round_to_half(-max_lanes(max(sub(zero(), a), sub(zero(), b))), scale + 16);
  const float step = round_to_half((highest - least) / 15.0f, scale);
  const Floats factor = set1(step > 0.0f ? 1.0f / step : 0.0f), low = set1(least);
  const auto round_lanes = [&](Floats v) {
    return to_ints(min(max(mul(sub(v, low), factor), zero()), set1(15.0f)));
  };
  store_int8(reinterpret_cast<int8_t*>(out), round_lanes(a));
  store_int8(reinterpret_cast<int8_t*>(out + 16), round_lanes(b));
}

void write_int4_key(const LayerCache& cache, int64_t page, int64_t token, int64_t head,
                    const float* given) {
  alignas(64) float key[kMaxDim];
  std::memcpy(key, given, static_cast<size_t>(cache.dim) * sizeof(float));
  spread(key, cache.dim);
  uint8_t* out = cache.keys + cache.tile(page, head, token) + token % 16 * 4;
  for (int64_t g = 0; g < cache.dim / kGroup; ++g) {
    uint8_t rounded[kGroup];
    round_to_int4(key + g * kGroup, rounded,
                  cache.half_scale(cache.key_scales, page, head, token, g));
    for (int64_t i = 0; i < kGroup; ++i) {
      uint8_t* at = out + (g * 4 + i / 8) * 64 + i % 4;
      *at = static_cast<uint8_t>(i % 8 < 4 ? rounded[i] : *at | rounded[i] << 4);
    }
  }
}

void write_int4_value(const LayerCache& cache, int64_t page, int64_t token, int64_t head,
                      const float* value) {
  uint8_t* out =
      cache.values + cache.tile(page, head, token) + token % 16 / 4 * cache.dim * 2 + token % 4;
  for (int64_t g = 0; g < cache.dim / kGroup; ++g) {
    uint8_t rounded[kGroup];
    round_to_int4(value + g * kGroup, rounded,
                  cache.half_scale(cache.value_scales, page, head, token, g));
    for (int64_t i = 0; i < 16; ++i) {
      out[g * 64 + i * 4] = static_cast<uint8_t>(rounded[i] | rounded[i + 16] << 4);
    }
  }
}

void read_key(const LayerCache& cache, int64_t page, int64_t token, int64_t head, float* out) {
  const uint8_t* at = cache.keys + cache.tile(page, head, token) + token % 16 * 4;
  if (cache.format == CacheFormat::kInt4) {
    for (int64_t i = 0; i < cache.dim; ++i) {
      const uint16_t* scale = cache.half_scale(cache.key_scales, page, head, token, i / kGroup);
      const uint8_t both = at[i / 8 * 64 + i % 4];
      const int q = i % 8 < 4 ? both & 15 : both >> 4;
      out[i] = half_to_float(scale) * static_cast<float>(q) + half_to_float(scale + 16);
    }
    spread(out, cache.dim);
    return;
  }
  const int64_t element = cache.element(), n = 4 / element;
  for (int64_t i = 0; i < cache.dim; ++i) {
    const uint8_t* from = at + i / n * 64 + i % n * element;
    if (cache.format != CacheFormat::kInt8) {
      out[i] = to_float(cache.format, from);
    } else {
      out[i] = static_cast<float>(*from - 128) * *cache.scale(cache.key_scales, page, head, token);
    }
  }
}

void read_value(const LayerCache& cache, int64_t page, int64_t token, int64_t head, float* out) {
  const uint8_t* at = cache.values + cache.tile(page, head, token);
  if (cache.format == CacheFormat::kInt4) {
    at += token % 16 / 4 * cache.dim * 2 + token % 4;
    for (int64_t i = 0; i < cache.dim; ++i) {
      const uint16_t* scale = cache.half_scale(cache.value_scales, page, head, token, i / kGroup);
      const uint8_t both = at[i / kGroup * 64 + i % 16 * 4];
      const int q = i % kGroup < 16 ? both & 15 : both >> 4;
      out[i] = half_to_float(scale) * static_cast<float>(q) + half_to_float(scale + 16);
    }
    return;
  }
  const int64_t element = cache.element(), n = 4 / element;
  at += (token % 16 / n * cache.dim * n + token % n) * element;
  for (int64_t i = 0; i < cache.dim; ++i) {
    const uint8_t* from = at + i * 4;
    if (cache.format != CacheFormat::kInt8) {
      out[i] = to_float(cache.format, from);
    } else {
      int8_t narrow;
      std::memcpy(&narrow, from, 1);
      out[i] = static_cast<float>(narrow) * *cache.scale(cache.value_scales, page, head, token);
    }
  }
}

}  // namespace

void write_key(const LayerCache& cache, int64_t slot, int64_t head, const float* key) {
  const int64_t page = slot / cache.page_size, token = slot % cache.page_size;
  if (cache.format == CacheFormat::kInt4) return write_int4_key(cache, page, token, head, key);
  const bool int8 = cache.format == CacheFormat::kInt8;
  alignas(64) uint8_t narrow[kMaxDim * 2];
  float* scale = int8 ? cache.scale(cache.key_scales, page, head, token) : nullptr;
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
  if (cache.format == CacheFormat::kInt4) return write_int4_value(cache, page, token, head, value);
  const int64_t element = cache.element(), n = 4 / element;
  alignas(64) uint8_t narrow[kMaxDim * 2];
  float* scale = cache.format == CacheFormat::kInt8
                     ? cache.scale(cache.value_scales, page, head, token)
                     : nullptr;
  const uint8_t* source = narrow_row(cache.format, value, cache.dim, narrow, scale);
  uint8_t* out = cache.values + cache.tile(page, head, token) +
                 (token % 16 / n * cache.dim * n + token % n) * element;
  for (int64_t i = 0; i < cache.dim; ++i) {
    std::memcpy(out + i * 4, source + i * element, static_cast<size_t>(element));
  }
}

void copy_page(const LayerCache& from, int64_t source, const LayerCache& to, int64_t target) {
  alignas(64) float vector[kMaxDim];
  for (int64_t head = 0; head < from.heads; ++head) {
    for (int64_t token = 0; token < from.page_size; ++token) {
      const int64_t slot = target * to.page_size + token;
      read_key(from, source, token, head, vector);
      write_key(to, slot, head, vector);
      read_value(from, source, token, head, vector);
      write_value(to, slot, head, vector);
    }
  }
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
