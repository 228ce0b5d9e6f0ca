// Weights in the one layout that every matmul reads: tiles of 16 output rows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace ryzanstein {

constexpr int kTile = 16;   // output rows a tile; one 512-bit register of 32-bit lanes
constexpr int kGroup = 32;  // inputs that share a scale

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

// 64-byte aligned, large ones on huge pages where the system gives them.
void* allocate_bytes(size_t bytes);

template <typename T>
Buffer<T> allocate(size_t count) {
  return Buffer<T>(static_cast<T*>(allocate_bytes(count * sizeof(T))));
}

enum class Format { kQ4, kQ8, kBf16 };

// kQ4: data[tile][group][256]: byte 64*j + 4*lane + t holds inputs 4*j + t (low nibble) and
//      16 + 4*j + t (high); value = scale * nibble + minimum.
// kQ8: data[tile][group][512]: byte 64*j + 4*lane + t holds input 4*j + t, offset by 128;
//      value = scale * (byte - 128).
// kBf16: data[tile][in / 2][16][2], bfloat16.
// scales[tile][group][16] and minima[tile][group][16] are fp16 bits.
struct Weight {
  Format format;
  int64_t rows = 0;
  int64_t columns = 0;
  Buffer<uint8_t> data;
  Buffer<uint16_t> scales;
  Buffer<uint16_t> minima;
  size_t bytes = 0;

  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  int64_t groups() const { return columns / kGroup; }
};

// From ggml's blocks, row by row: `q4_0` (scale, nibbles - 8), `q4_1` (scale, minimum, nibbles),
// `q8_0` (scale, bytes). Nothing is rounded.
std::shared_ptr<Weight> pack_q4_0(const uint8_t* blocks, int64_t rows, int64_t columns);
std::shared_ptr<Weight> pack_q4_1(const uint8_t* blocks, int64_t rows, int64_t columns);
std::shared_ptr<Weight> pack_q8_0(const uint8_t* blocks, int64_t rows, int64_t columns);
// From floats: rounded to int8 in groups of 32 by their largest magnitude, or to bfloat16.
std::shared_ptr<Weight> pack_int8(const float* values, int64_t rows, int64_t columns);
std::shared_ptr<Weight> pack_bf16(const float* values, int64_t rows, int64_t columns);

}  // namespace ryzanstein
