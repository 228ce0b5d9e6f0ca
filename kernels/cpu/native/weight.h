// Weights in the layouts that every instruction set's matmul reads: tiles of 16 output rows, each in
// one piece, so that a matmul with few rows is one sequential read.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace ryzanstein {

constexpr int kTile = 16;   // output rows a tile
constexpr int kGroup = 32;  // inputs that share a scale
constexpr int kChunk = 16;  // ternary inputs in 64 bytes a tile
constexpr int kPairBytes = 64 + 2 * 512;  // two int8 groups of a tile and their scales
constexpr int kEvenPairBytes = 64 + 2 * 256;  // two kQ4Even groups of a tile and their scales
constexpr int kQuadBytes = 64 + 4 * 256;  // four groups of kFloat4 and their scales
constexpr int kSuperBlock = 256;  // inputs whose groups' scales have a factor in common
constexpr int kSuperBytes = 64 + 8 * (32 + 256);  // a tile's

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

// What lies in a tile; `lane` is the output row within it.
// kF32: [in][16] float.
// kBf16: [in / 2][16][2] bfloat16.
// kQ8: [pair of groups] of 2 x 16 fp16 scales and 2 x 512 bytes; an odd last group has 512 only. Byte
//      64*j + 4*lane + t of a group holds input 4*j + t, offset by 128; value = scale * (byte - 128).
// kQ4: [group] of 16 fp16 scales, 16 fp16 minima and 256 bytes. Byte 64*j + 4*lane + t holds inputs
//      4*j + t (low nibble) and 16 + 4*j + t (high); value = scale * nibble + minimum.
// kQ4Super: [256 inputs] of 16 fp16 factors of scales and 16 of minima, then of 8 groups 16 bytes of scales and
//      16 of minima, then their 8 x 256 bytes as in kQ4; scale and minimum are a factor by a byte.
// kTernary: [chunk][64], then 16 float scales. Byte 4*lane + t holds inputs 4*j + t in bits 2*j;
//      value = scale * (bits - 1).
// kFloat4: [four groups] of 4 x 16 scales and 4 x 256 bytes; a last quad has only the groups that there are.
//      Bytes as in kQ4, nibbles the floats of two exponent bits and one mantissa bit that MXFP4 has; scales
//      are powers of two, the exponent plus 127.
// kQ4Even: [pair of groups] of 2 x 16 fp16 scales and 2 x 256 bytes; an odd last group has 256 only. Bytes as
//      in kQ4; value = scale * (nibble - 8).
// The numbers are part of the packed files' format.
enum class Format : int32_t {
  kF32 = 0, kBf16 = 1, kQ8 = 2, kQ4 = 3, kQ4Super = 4, kTernary = 5, kFloat4 = 6, kQ4Even = 7
};

// Twice what a nibble of kFloat4 stands for, and kFloat4Offset more.
constexpr int kFloat4Offset = 12;
constexpr uint8_t kFloat4Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Weight {
  Format format;
  int64_t rows = 0;
  int64_t columns = 0;
  uint8_t* data = nullptr;
  std::shared_ptr<void> owner;  // of `data`
  size_t bytes = 0;

  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  int64_t groups() const { return columns / kGroup; }
  int64_t chunks() const { return (columns + kChunk - 1) / kChunk; }
  int64_t tile_bytes() const;
  uint8_t* tile(int64_t number) const { return data + number * tile_bytes(); }
  // The first tile of one of so many pieces of nearly equal size; cut between pairs, since a matmul may take
  // two tiles at a time.
  int64_t cut(int64_t piece, int64_t pieces) const {
    return piece == pieces ? tiles() : tiles() * piece / pieces / 2 * 2;
  }
  // Offsets in a tile of a group's scales and bytes.
  static constexpr int64_t scales_at(Format format, int64_t group) {
    if (format == Format::kQ8) return group / 2 * kPairBytes + group % 2 * 32;
    if (format == Format::kQ4Even) return group / 2 * kEvenPairBytes + group % 2 * 32;
    if (format == Format::kFloat4) return group / 4 * kQuadBytes + group % 4 * 16;
    if (format == Format::kQ4Super) return factors_at(group) + 64 + group % 8 * 32;
    return group * 320;
  }
  static constexpr int64_t bytes_at(Format format, int64_t group) {
    if (format == Format::kQ8) return group / 2 * kPairBytes + 64 + group % 2 * 512;
    if (format == Format::kQ4Even) return group / 2 * kEvenPairBytes + 64 + group % 2 * 256;
    if (format == Format::kFloat4) return group / 4 * kQuadBytes + 64 + group % 4 * 256;
    if (format == Format::kQ4Super) return factors_at(group) + 64 + 8 * 32 + group % 8 * 256;
    return scales_at(format, group) + 64;
  }
  static constexpr int64_t factors_at(int64_t group) { return group / 8 * kSuperBytes; }
  int64_t scales_at(int64_t group) const { return scales_at(format, group); }
  int64_t bytes_at(int64_t group) const { return bytes_at(format, group); }
};

// Memory for many weights in few large pieces, so that all of it lies on huge pages: a matmul with few
// rows would otherwise wait for page tables as much as for weights.
class Arena {
 public:
  std::shared_ptr<void> allocate(size_t bytes);

 private:
  std::shared_ptr<void> slab_;
  size_t used_ = 0, size_ = 0;
};

// An empty weight of this shape, zeroed. Throws std::invalid_argument if the format cannot hold it.
std::shared_ptr<Weight> make_weight(Arena& arena, Format format, int64_t rows, int64_t columns);

// Packing writes rows [first, first + count) of `w`. From ggml's blocks, nothing rounded: `q4_0`
// (scale, nibbles - 8), `q4_1` (scale, minimum, nibbles), `q8_0` (scale, bytes), `q4_k` (scales and
// minima of six bits under two fp16 factors, in blocks of 256) and `mxfp4` (scale, nibbles).
void pack_q4_0(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count);
void pack_q4_1(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count);
void pack_q8_0(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count);
void pack_q4_k(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count);
void pack_mxfp4(const Weight& w, int64_t first, const uint8_t* blocks, int64_t count);
// From floats: rounded to int8 in groups of 32 by their largest magnitude, to four bits in groups of 32
// with the scale and minimum that fit best, to bfloat16, or as is.
void pack_int4(const Weight& w, int64_t first, const float* values, int64_t count);
void pack_int8(const Weight& w, int64_t first, const float* values, int64_t count);
void pack_bf16(const Weight& w, int64_t first, const float* values, int64_t count);
void pack_f32(const Weight& w, int64_t first, const float* values, int64_t count);
// From signs -1, 0 and 1, row by row, and one scale.
void pack_ternary(const Weight& w, int64_t first, const int8_t* signs, int64_t count, float scale);

}  // namespace ryzanstein
