#include "weight.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace ryzanstein {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSlab = size_t{64} << 20;

uint16_t read16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

// By hand, so that this file runs on any processor (F16C came with Ivy Bridge).
float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, rest = bits & 1023;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t raw = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13;
  float value;
  std::memcpy(&value, &raw, 4);
  return value;
}

// To the nearest, ties to even.
uint16_t float_to_half(float value) {
  uint32_t raw;
  std::memcpy(&raw, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(raw >> 16 & 0x8000);
  const uint32_t magnitude = raw & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Below the smallest normal: counted in units of 2^-24.
    float positive;
    std::memcpy(&positive, &magnitude, 4);
    return sign | static_cast<uint16_t>(std::nearbyint(positive * 0x1p24f));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Calls place(tile, lane, index of the group among all that are packed, group) for every group.
template <typename Place>
void each_group(const Weight& w, int64_t first, int64_t count, const Place& place) {
  for (int64_t row = first; row < first + count; ++row) {
    for (int64_t group = 0; group < w.groups(); ++group) {
      place(w.tile(row / kTile), row % kTile, (row - first) * w.groups() + group, group);
    }
  }
}

template <typename T>
void put(uint8_t* at, int64_t index, T value) {
  std::memcpy(at + index * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

// Nibbles in ggml's order: byte i holds inputs i and 16 + i.
void put_nibbles(uint8_t* bytes, int64_t lane, const uint8_t* nibbles) {
  for (int j = 0; j < 4; ++j) std::memcpy(bytes + 64 * j + 4 * lane, nibbles + 4 * j, 4);
}

void put_q4(uint8_t* group, int64_t lane, uint16_t scale, uint16_t minimum, const uint8_t* nibbles) {
  put(group, lane, scale);
  put(group + 32, lane, minimum);
  put_nibbles(group + 64, lane, nibbles);
}

// Sums of `kGroup` terms, four at a time, so that they are vectors without leave to reorder.
template <typename Term>
float sum_of(const Term& term) {
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int i = 0; i < kGroup; i += 4) {
    for (int j = 0; j < 4; ++j) sums[j] += term(i + j);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A group as whole numbers from 0 to 15 under a scale and a minimum, both fp16.
struct FourBits {
  uint16_t scale = 0, minimum = 0;
  float numbers[kGroup] = {};
};

void round_group(const float* x, float scale, float minimum, float* numbers) {
  constexpr float kRound = 12582912.0f;  // adding it leaves the nearest integer
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    const float inside = std::min(15.0f, std::max(0.0f, (x[i] - minimum) * inverse));
    numbers[i] = inside + kRound - kRound;
  }
}

// Of several ranges, the whole one and narrower ones about the same middle, the one that leaves the least
// squared error; each with the line through its numbers that fits best.
FourBits fit_four_bits(const float* x) {
  float low = x[0], high = x[0];
  for (int i = 1; i < kGroup; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  FourBits best;
  float least = std::numeric_limits<float>::infinity();
  for (const float share : {1.0f, 0.93f, 0.86f, 0.79f}) {
    const float step = (high - low) * share / 15.0f;
    FourBits fit;
    round_group(x, step, (low + high) * 0.5f - 7.5f * step, fit.numbers);
    const float* q = fit.numbers;
    const float mean = sum_of([&](int i) { return x[i]; }) / kGroup;
    const float middle = sum_of([&](int i) { return q[i]; }) / kGroup;
    const float spread = sum_of([&](int i) { return (q[i] - middle) * (q[i] - middle); });
    const float along = sum_of([&](int i) { return (q[i] - middle) * (x[i] - mean); });
    const float slope = spread > 0.0f ? along / spread : 0.0f;
    fit.scale = float_to_half(slope);
    const float scale = half_to_float(fit.scale);
    fit.minimum = float_to_half(mean - scale * middle);
    const float minimum = half_to_float(fit.minimum);
    round_group(x, scale, minimum, fit.numbers);
    const float error = sum_of([&](int i) {
      const float missed = x[i] - (minimum + scale * q[i]);
      return missed * missed;
    });
    if (error < least) {
      least = error;
      best = fit;
    }
  }
  return best;
}

void put_q8(const Weight& w, uint8_t* tile, int64_t lane, int64_t group, uint16_t scale,
            const int8_t* values) {
  put(tile + w.scales_at(group), lane, scale);
  uint8_t* out = tile + w.bytes_at(group) + 4 * lane;
  for (int i = 0; i < kGroup; ++i) {
    out[64 * (i / 4) + i % 4] = static_cast<uint8_t>(values[i] + 128);
  }
}

}  // namespace

void* allocate_bytes(size_t bytes) {
  size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  size_t rounded = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, rounded);
  if (p == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) madvise(p, rounded, MADV_HUGEPAGE);
  return p;
}

int64_t Weight::tile_bytes() const {
  switch (format) {
    case Format::kF32: return columns * kTile * 4;
    case Format::kBf16: return columns * kTile * 2;
    case Format::kQ8: return groups() / 2 * kPairBytes + groups() % 2 * (64 + 512);
    case Format::kQ4Even:
      return groups() / 2 * kEvenPairBytes + groups() % 2 * (64 + 256);
    case Format::kQ4Super: return columns / kSuperBlock * kSuperBytes;
    case Format::kTernary: return chunks() * 64 + 64;
    case Format::kFloat4:
      return groups() / 4 * kQuadBytes + (groups() % 4 ? 64 + groups() % 4 * 256 : 0);
    default: return scales_at(groups());
  }
}

std::shared_ptr<void> Arena::allocate(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (used_ + bytes > size_) {
    // What is left of the last slab stays untouched, and so takes no memory.
    size_ = std::max(bytes, kSlab);
    used_ = 0;
    slab_ = std::shared_ptr<void>(allocate_bytes(size_), std::free);
  }
  std::shared_ptr<void> piece(slab_, static_cast<uint8_t*>(slab_.get()) + used_);
  used_ += bytes;
  return piece;
}

std::shared_ptr<Weight> make_weight(Arena& arena, Format format, int64_t rows, int64_t columns) {
  const bool grouped = format == Format::kQ8 || format == Format::kQ4 ||
                       format == Format::kFloat4 || format == Format::kQ4Even;
  if (rows <= 0 || columns <= 0 || (grouped && columns % kGroup) ||
      (format == Format::kQ4Super && columns % kSuperBlock) ||
      (format == Format::kBf16 && columns % 2)) {
    throw std::invalid_argument("the columns do not fill whole groups");
  }
  auto w = std::make_shared<Weight>();
  w->format = format;
  w->rows = rows;
  w->columns = columns;
  w->bytes = static_cast<size_t>(w->tiles() * w->tile_bytes());
  w->owner = arena.allocate(w->bytes);
  w->data = static_cast<uint8_t*>(w->owner.get());
  // Rows that only fill the last tile have to be finite.
  std::memset(w->data, 0, w->bytes);
  return w;
}

void pack_q4_0(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count) {
  each_group(w, first, count, [&](uint8_t* tile, int64_t lane, int64_t index, int64_t group) {
    const uint8_t* block = blocks + index * 18;
    const uint16_t scale = read16(block);
    if (w.format == Format::kQ4Even) {
      put(tile + w.scales_at(group), lane, scale);
      put_nibbles(tile + w.bytes_at(group), lane, block + 2);
      return;
    }
    const uint16_t minimum = float_to_half(-8.0f * half_to_float(scale));
    put_q4(tile + w.scales_at(group), lane, scale, minimum, block + 2);
  });
}

void pack_q4_1(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count) {
  each_group(w, first, count, [&](uint8_t* tile, int64_t lane, int64_t index, int64_t group) {
    const uint8_t* block = blocks + index * 20;
    put_q4(tile + w.scales_at(group), lane, read16(block), read16(block + 2), block + 4);
  });
}

void pack_q8_0(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count) {
  each_group(w, first, count, [&](uint8_t* tile, int64_t lane, int64_t index, int64_t group) {
    const uint8_t* block = blocks + index * 34;
    put_q8(w, tile, lane, group, read16(block), reinterpret_cast<const int8_t*>(block + 2));
  });
}

void pack_mxfp4(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count) {
  each_group(w, first, count, [&](uint8_t* tile, int64_t lane, int64_t index, int64_t group) {
    const uint8_t* block = blocks + index * 17;
    tile[w.scales_at(group) + lane] = *block;
    put_nibbles(tile + w.bytes_at(group), lane, block + 1);
  });
}

void pack_q4_k(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count) {
  each_group(w, first, count, [&](uint8_t* tile, int64_t lane, int64_t index, int64_t group) {
    const uint8_t* block = blocks + index / 8 * 144;
    const uint8_t* six = block + 4;  // 8 scales and 8 minima of six bits, interleaved
    const int64_t k = index % 8;
    const int scale = k < 4 ? six[k] & 63 : (six[k + 4] & 15) | six[k - 4] >> 6 << 4;
    const int minimum = k < 4 ? six[k + 4] & 63 : six[k + 4] >> 4 | six[k] >> 6 << 4;
    put(tile + w.factors_at(group), lane, read16(block));
    // Subtracted there, added here.
    put(tile + w.factors_at(group) + 32, lane, static_cast<uint16_t>(read16(block + 2) ^ 0x8000));
    tile[w.scales_at(group) + lane] = static_cast<uint8_t>(scale);
    tile[w.scales_at(group) + 16 + lane] = static_cast<uint8_t>(minimum);
    uint8_t* out = tile + w.bytes_at(group);
    // Two groups of a block share 32 bytes: the even one their low nibbles.
    const uint8_t* nibbles = block + 16 + k / 2 * 32;
    for (int i = 0; i < 16; ++i) {
      const int low = k % 2 ? nibbles[i] >> 4 : nibbles[i] & 15;
      const int high = k % 2 ? nibbles[16 + i] >> 4 : nibbles[16 + i] & 15;
      out[64 * (i / 4) + 4 * lane + i % 4] = static_cast<uint8_t>(low | high << 4);
    }
  });
}

void pack_int8(const Weight& w, int64_t first, const float* values, int64_t count) {
  each_group(w, first, count, [&](uint8_t* tile, int64_t lane, int64_t index, int64_t group) {
    const float* x = values + index * kGroup;
    float largest = 0.0f;
    for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::fabs(x[i]));
    const uint16_t scale = float_to_half(largest / 127.0f);
    const float rounded = half_to_float(scale);
    const float inverse = rounded > 0.0f ? 1.0f / rounded : 0.0f;
    int8_t quantized[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const float q = std::nearbyint(x[i] * inverse);
      quantized[i] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, q)));
    }
    put_q8(w, tile, lane, group, scale, quantized);
  });
}

void pack_int4(const Weight& w, int64_t first, const float* values, int64_t count) {
  each_group(w, first, count, [&](uint8_t* tile, int64_t lane, int64_t index, int64_t group) {
    const FourBits fit = fit_four_bits(values + index * kGroup);
    uint8_t nibbles[kGroup / 2];
    for (int i = 0; i < kGroup / 2; ++i) {
      nibbles[i] = static_cast<uint8_t>(static_cast<int>(fit.numbers[i]) |
                                        static_cast<int>(fit.numbers[i + kGroup / 2]) << 4);
    }
    put_q4(tile + w.scales_at(group), lane, fit.scale, fit.minimum, nibbles);
  });
}

void pack_bf16(const Weight& w, int64_t first, const float* values, int64_t count) {
  for (int64_t row = first; row < first + count; ++row, values += w.columns) {
    uint8_t* tile = w.tile(row / kTile);
    for (int64_t i = 0; i < w.columns; ++i) {
      put(tile, i / 2 * kTile * 2 + row % kTile * 2 + i % 2, to_bf16(values[i]));
    }
  }
}

void pack_f32(const Weight& w, int64_t first, const float* values, int64_t count) {
  for (int64_t row = first; row < first + count; ++row, values += w.columns) {
    uint8_t* tile = w.tile(row / kTile);
    for (int64_t i = 0; i < w.columns; ++i) put(tile, i * kTile + row % kTile, values[i]);
  }
}

void pack_ternary(const Weight& w, int64_t first, const int8_t* signs, int64_t count, float scale) {
  for (int64_t row = first; row < first + count; ++row, signs += w.columns) {
    uint8_t* tile = w.tile(row / kTile);
    const int64_t lane = row % kTile;
    put(tile + w.chunks() * 64, lane, scale);
    for (int64_t i = 0; i < w.columns; ++i) {
      const int code = signs[i] + 1;
      uint8_t* byte = tile + i / kChunk * 64 + 4 * lane + i % 4;
      *byte = static_cast<uint8_t>(*byte | code << (i % kChunk / 4 * 2));
    }
  }
}

}  // namespace ryzanstein
