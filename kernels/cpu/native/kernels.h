// The kernels that a program's instructions call, once for each instruction set. Activations are fp32
// `[rows, width]` unless said otherwise. Every row's arithmetic happens in one order, whatever the
// number of rows or threads.
#pragma once

#include <cstdint>
#include <vector>

#include "weight.h"

namespace ryzanstein {

// Activations in the forms that matmuls and other ops read; those that nobody reads are null.
struct Activations {
  float* floats = nullptr;
  uint16_t* bf16 = nullptr;
  // For kQ4, kQ4Super, kQ4Even, kQ8, kFloat4. In one piece, so that a pass holds one pointer a row.
  struct Group {
    int8_t values[kGroup];       // round(x / scale)
    float scale;                 // largest magnitude / 127
    float sum;                   // scale * sum of values
    int32_t offset8, offset128;  // -8 and -128 times the sum of values
  };
  Group* groups = nullptr;  // [rows, width / 32]
  // Whole rows: for kTernary.
  int8_t* row_values = nullptr;    // [rows, row_stride(width)], round(x / scale), zeros behind
  float* row_scales = nullptr;     // [rows], largest magnitude / 127
  int32_t* row_offsets = nullptr;  // [rows], -sum of values

  static int64_t row_stride(int64_t width) { return (width + kChunk - 1) / kChunk * kChunk; }
};

constexpr int kMaxDim = 576;  // latents of 512 and a key of 64

// The paged cache of one layer. Pages hold `page_size` tokens, a multiple of 16.
enum class CacheFormat : int32_t { kF32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

// With n elements in four bytes (1, 2 or 4):
// keys:   [page][kv head][page_size / 16][dim / n][16][n]; kInt8 bytes are offset by 128
// values: [page][kv head][page_size / n][dim][n]
// scales: [page][kv head][page_size] fp32, largest magnitude / 127 of one token's head; kInt8 only
//
// kInt4 has groups of 32 of a token's dims, each scale * (0 to 15) + lowest, the keys' after a
// Walsh-Hadamard transform; no byte belongs to two
// tokens, since they are written at the same time:
// keys:   [page][kv head][page_size / 16][dim / 8][16][4], of eight dims the low halves hold the first
// values: [page][kv head][page_size / 4][dim / 32][16][4], of 32 dims the low halves hold the first
// scales: [page][kv head][page_size / 16][dim / 32][2: scale, lowest][16] fp16
struct LayerCache {
  CacheFormat format;
  uint8_t* keys;
  uint8_t* values;
  void* key_scales;
  void* value_scales;
  int64_t page_size, heads, dim;
  bool windowed;  // its pages are window pages

  // Bytes of an element; kInt4 has two in a byte.
  int64_t element() const {
    return format == CacheFormat::kF32 ? 4 : format == CacheFormat::kBf16 ? 2 : 1;
  }
  // Bytes of one token's head in `keys` or `values`, and those of its scales.
  int64_t vector_bytes() const {
    return format == CacheFormat::kInt4 ? dim / 2 : dim * element();
  }
  int64_t scale_bytes() const {
    return format == CacheFormat::kInt4 ? dim / 8 : format == CacheFormat::kInt8 ? 4 : 0;
  }
  bool fits() const {
    const int64_t whole = format == CacheFormat::kInt4 ? 32 : 4 / element();
    return dim > 0 && dim <= kMaxDim && dim % whole == 0 && page_size % 16 == 0;
  }
  // Index of a token's scale.
  int64_t place(int64_t page, int64_t head, int64_t token) const {
    return (page * heads + head) * page_size + token;
  }
  // Where the 16 tokens around `token` begin, in `keys` and in `values` alike.
  int64_t tile(int64_t page, int64_t head, int64_t token) const {
    return place(page, head, token) / 16 * 16 * vector_bytes();
  }
  // A token's scale in kInt8.
  float* scale(void* scales, int64_t page, int64_t head, int64_t token) const {
    return static_cast<float*>(scales) + place(page, head, token);
  }
  // A token's scale of a group of 32 dims in kInt4; its lowest value lies 16 further.
  uint16_t* half_scale(void* scales, int64_t page, int64_t head, int64_t token,
                       int64_t group) const {
    return static_cast<uint16_t*>(scales) + place(page, head, token) / 16 * dim + group * 32 +
           token % 16;
  }
};

constexpr int kQueryRows = 24;

// Columns of a memory that lie together, or 16 where they are no multiple of it: a row's whole width apart
// they would fall on few sets of the first cache.
constexpr int64_t kDeltaTile = 32;

// The states of one layer of delta nets, fp32: `inputs` [states, taps - 1, width], the oldest first, and
// `memory` [states, value heads, value_dim / tile, key_dim, tile].
struct LayerStates {
  float* inputs;
  float* memory;
  int64_t taps, key_heads, value_heads, key_dim, value_dim;
  bool tiled;  // value heads take turns with the key heads; else several in a row share one

  int64_t input_size() const {
    return (taps - 1) * (2 * key_heads * key_dim + value_heads * value_dim);
  }
};

// Added to a squared length before its root is taken.
constexpr float kUnitEpsilon = 1e-6f;

// One head of delta nets over `tokens` tokens: rows of queries, keys and values are `stride` apart, those of
// gates, what the memory is multiplied by and `share_at` further how much of a value it takes,
// `gate_stride`. After `kept` tokens the memory goes to `kept_memory`, too, if that is not null.
struct DeltaRun {
  float* memory;  // [value_dim / tile, key_dim, tile]
  int64_t key_dim, value_dim, tokens;
  const float *queries, *keys, *values;
  int64_t stride;
  const float* gates;
  int64_t gate_stride, share_at;
  float* out;
  int64_t out_stride;
  int64_t kept;
  float* kept_memory;
};

// How one row's distribution is narrowed; see kernels/sampling.py.
struct Filters {
  float temperature;
  int32_t top_k;  // 0 is off
  float top_p;
  float min_p;
  double uniform;  // in [0, 1), the draw's only randomness
};

// What one row has said already: `counts` of generated tokens, `seen` also in the prompt.
struct Penalty {
  const int32_t* counts;
  const bool* seen;
  float repetition, presence, frequency;
};

// Memory that is read soon, by another op: whoever computes meanwhile fetches it.
struct Soon {
  struct Piece {
    const uint8_t *begin, *end;
  };
  const Piece* pieces = nullptr;
  int64_t count = 0;
  // Weights that the thread reads first of its next matmul, where it reads no more of this one's.
  Piece tiles{nullptr, nullptr};
};

// Work whose speed bounds everything else.
enum class Probe : int32_t { kInt8Dot = 0, kBf16Dot = 1, kFloat = 2, kRead = 3 };

struct Kernels {
  const char* name;
  // Whether bfloat16 weights meet activations in bfloat16; else they meet floats.
  bool rounds_pairs;

  // y[r, out] = x[r] . w[out] (+ bias[out]) for rows [row, row + rows) and tiles [first, last) of 16
  // outputs. If there are more than a few rows, what is read `soon` is fetched on the way, as far as that
  // costs little.
  void (*matmul)(const Weight& w, const Activations& x, int64_t row, int64_t rows,
                 const float* bias, float* y, int64_t first, int64_t last, const Soon& soon);
  // Writes row `row` in every quantized or narrow form that `out` has room for.
  void (*store_forms)(const float* x, int64_t width, int64_t row, const Activations& out);
  // out = row `index` of the table times `scale`.
  void (*embed_row)(const Weight& table, int64_t index, float scale, float* out);
  // out = x / sqrt(mean(x^2) + eps) * weight; `out` may be `x`.
  void (*rms_norm_row)(const float* x, const float* weight, float eps, int64_t width, float* out);
  float (*squared_norm)(const float* x, int64_t width);
  // out = x * factor * weight; `out` may be `x`.
  void (*scale_row)(const float* x, const float* weight, float factor, int64_t width, float* out);
  void (*add_row)(const float* a, const float* b, int64_t width, float* out);
  // out = activation(x[:width]) * x[width:]; 0 is SiLU, 1 GELU (tanh form), 2 squared ReLU, 3 gpt-oss's
  // clamped SwiGLU, for which x[width:] is one more.
  void (*gated_row)(const float* x, int64_t width, int activation, float* out);
  // Rotates the halves of one head in place.
  void (*rotate_head)(float* head, const float* cosine, const float* sine, int64_t dim);

  void (*write_key)(const LayerCache& cache, int64_t slot, int64_t head, const float* key);
  void (*write_value)(const LayerCache& cache, int64_t slot, int64_t head, const float* value);
  // Writes a page's vectors of all heads into a page of another cache, whatever the two formats.
  void (*copy_page)(const LayerCache& from, int64_t source, const LayerCache& to, int64_t target);
  // Attention of `rows` query rows (`[dim]` each, all of one kv head, at `positions`) over one
  // sequence's pages. `out[row]` are `[dim]`. At most kQueryRows rows. `sinks`, one a row, are scores
  // of one more key, which has no value; null if there is none.
  void (*attend)(const LayerCache& cache, const int32_t* pages, int64_t head, int rows,
                 const float* const* queries, const int64_t* positions, const float* sinks,
                 float scale, int64_t window, float* const* out);

  void (*delta_head)(const DeltaRun& run);
  // out = the sum of inputs[t] * weights[t], or if `activated` its SiLU; `weights` [taps, width].
  void (*convolve_row)(const float* const* inputs, const float* weights, int taps, int64_t width,
                       bool activated, float* out);
  // out = a * b; `out` may be either.
  void (*multiply_row)(const float* a, const float* b, int64_t width, float* out);
  // x = scale * x / |x|, `dim` a multiple of 16.
  void (*unit_row)(float* x, int64_t dim, float scale);
  // out = x * activation(gate); 0 is the sigmoid, 1 SiLU, 2 GELU (tanh form). `out` may be `x`.
  void (*gate_row)(const float* x, const float* gate, int64_t width, int activation, float* out);
  // x = cap * tanh(x / cap)
  void (*softcap_row)(float cap, int64_t width, float* x);

  // Penalties on one row in place, as kernels/sampling.py defines them.
  void (*penalize)(float* logits, int64_t vocab, const Penalty& penalty);
  // out = x where the token's bit in `mask` is set, else -infinity; `out` may be `x`.
  void (*forbid)(const uint32_t* mask, const float* x, int64_t vocab, float* out);
  // The likeliest token, the first of equals.
  int64_t (*argmax)(const float* logits, int64_t vocab);
  // One draw from the filtered distribution; `scratch` holds kDrawBytes * vocab bytes.
  int64_t (*draw)(const float* logits, int64_t vocab, const Filters& filters, uint8_t* scratch);

  // Does a piece of the probe's work; returns how many operations, or bytes read from `memory`.
  int64_t (*probe)(Probe kind, const uint8_t* memory, int64_t bytes);
};

constexpr int64_t kDrawBytes = 12;

// Kernels by name, or null if there are none or this processor lacks the instructions:
// `avx2` (with FMA and F16C), `avxvnni` (the same with byte products), `avx512` (F, BW, VL, DQ, VNNI),
// `avx512bf16`.
const Kernels* find_kernels(const char* name);
// All that this processor runs, best first.
std::vector<const Kernels*> running_kernels();

namespace avx2 { extern const Kernels kernels; }
namespace avxvnni { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }

}  // namespace ryzanstein
