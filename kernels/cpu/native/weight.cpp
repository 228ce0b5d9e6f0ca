#include "weight.h"

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ryzanstein {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

uint16_t read16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

uint16_t to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

float from_half(uint16_t bits) { return _cvtsh_ss(bits); }

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

std::shared_ptr<Weight> make(Format format, int64_t rows, int64_t columns, int64_t group_bytes) {
  if (columns % (format == Format::kBf16 ? 2 : kGroup)) {
    throw std::invalid_argument("columns do not fill whole groups");
  }
  auto w = std::make_shared<Weight>();
  w->format = format;
  w->rows = rows;
  w->columns = columns;
  size_t blocks = static_cast<size_t>(w->tiles() * w->groups());
  w->bytes = format == Format::kBf16 ? static_cast<size_t>(w->tiles() * columns) * kTile * 2
                                     : blocks * static_cast<size_t>(group_bytes);
  w->data = allocate<uint8_t>(w->bytes);
  // Rows that only fill the last tile have to be finite.
  std::memset(w->data.get(), 0, w->bytes);
  if (format != Format::kBf16) {
    w->scales = allocate<uint16_t>(blocks * kTile);
    std::memset(w->scales.get(), 0, blocks * kTile * 2);
    w->bytes += blocks * kTile * 2;
  }
  if (format == Format::kQ4) {
    w->minima = allocate<uint16_t>(blocks * kTile);
    std::memset(w->minima.get(), 0, blocks * kTile * 2);
    w->bytes += blocks * kTile * 2;
  }
  return w;
}

// Calls place(tile * groups + group, lane, row, group) for every group of every real row.
template <typename Place>
void each_group(const Weight& w, const Place& place) {
  for (int64_t row = 0; row < w.rows; ++row) {
    for (int64_t group = 0; group < w.groups(); ++group) {
      place(row / kTile * w.groups() + group, static_cast<int>(row % kTile), row, group);
    }
  }
}

void place_nibbles(uint8_t* block, int lane, const uint8_t* nibbles) {
  for (int j = 0; j < 4; ++j) std::memcpy(block + 64 * j + 4 * lane, nibbles + 4 * j, 4);
}

void place_bytes(uint8_t* block, int lane, const int8_t* values) {
  for (int j = 0; j < 8; ++j) {
    for (int t = 0; t < 4; ++t) {
      block[64 * j + 4 * lane + t] = static_cast<uint8_t>(values[4 * j + t] + 128);
    }
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

std::shared_ptr<Weight> pack_q4_0(const uint8_t* blocks, int64_t rows, int64_t columns) {
  auto w = make(Format::kQ4, rows, columns, 256);
  each_group(*w, [&](int64_t place, int lane, int64_t row, int64_t group) {
    const uint8_t* block = blocks + (row * w->groups() + group) * 18;
    uint16_t scale = read16(block);
    w->scales[place * kTile + lane] = scale;
    w->minima[place * kTile + lane] = to_half(-8.0f * from_half(scale));
    place_nibbles(w->data.get() + place * 256, lane, block + 2);
  });
  return w;
}

std::shared_ptr<Weight> pack_q4_1(const uint8_t* blocks, int64_t rows, int64_t columns) {
  auto w = make(Format::kQ4, rows, columns, 256);
  each_group(*w, [&](int64_t place, int lane, int64_t row, int64_t group) {
    const uint8_t* block = blocks + (row * w->groups() + group) * 20;
    w->scales[place * kTile + lane] = read16(block);
    w->minima[place * kTile + lane] = read16(block + 2);
    place_nibbles(w->data.get() + place * 256, lane, block + 4);
  });
  return w;
}

std::shared_ptr<Weight> pack_q8_0(const uint8_t* blocks, int64_t rows, int64_t columns) {
  auto w = make(Format::kQ8, rows, columns, 512);
  each_group(*w, [&](int64_t place, int lane, int64_t row, int64_t group) {
    const uint8_t* block = blocks + (row * w->groups() + group) * 34;
    w->scales[place * kTile + lane] = read16(block);
    place_bytes(w->data.get() + place * 512, lane, reinterpret_cast<const int8_t*>(block + 2));
  });
  return w;
}

std::shared_ptr<Weight> pack_int8(const float* values, int64_t rows, int64_t columns) {
  auto w = make(Format::kQ8, rows, columns, 512);
  each_group(*w, [&](int64_t place, int lane, int64_t row, int64_t group) {
    const float* x = values + row * columns + group * kGroup;
    float largest = 0.0f;
    for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::fabs(x[i]));
    uint16_t scale = to_half(largest / 127.0f);
    float rounded = from_half(scale);
    float inverse = rounded > 0.0f ? 1.0f / rounded : 0.0f;
    int8_t quantized[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      float q = std::nearbyint(x[i] * inverse);
      quantized[i] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, q)));
    }
    w->scales[place * kTile + lane] = scale;
    place_bytes(w->data.get() + place * 512, lane, quantized);
  });
  return w;
}

std::shared_ptr<Weight> pack_bf16(const float* values, int64_t rows, int64_t columns) {
  auto w = make(Format::kBf16, rows, columns, 0);
  auto* data = reinterpret_cast<uint16_t*>(w->data.get());
  for (int64_t row = 0; row < rows; ++row) {
    uint16_t* tile = data + row / kTile * columns * kTile + row % kTile * 2;
    for (int64_t i = 0; i < columns; ++i) {
      tile[i / 2 * kTile * 2 + i % 2] = to_bf16(values[row * columns + i]);
    }
  }
  return w;
}

}  // namespace ryzanstein
