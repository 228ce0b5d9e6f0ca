// The kernels that a program's instructions call. Activations are fp32 `[rows, width]` unless said
// otherwise. Every row's arithmetic happens in one order, whatever the number of rows or threads.
#pragma once

#include <cstdint>

#include "weight.h"

namespace ryzanstein {

// Activations as the matmul of one weight format reads them.
struct Quantized {
  int8_t* values = nullptr;   // kQ4, kQ8: [rows, width], round(x / scale)
  float* scales = nullptr;    // [rows, width / 32], largest magnitude / 127
  float* sums = nullptr;      // [rows, width / 32], scale * sum of values
  int32_t* counts = nullptr;  // [rows, width / 32], -128 * sum of values
  uint16_t* bf16 = nullptr;   // kBf16: [rows, width]
};

// y[row, out] = x[row] . w[out] (+ bias[out]) for tiles [first, last) of 16 outputs.
void matmul(const Weight& w, const Quantized& x, int64_t rows, const float* bias, float* y,
            int64_t first, int64_t last);

// Writes row `row` of `x` in every form that `out` has room for.
void quantize_row(const float* x, int64_t width, int64_t row, const Quantized& out);

// out = row `index` of the table times `scale`.
void embed_row(const Weight& table, int64_t index, float scale, float* out);

// out = x / sqrt(mean(x^2) + eps) * weight; `out` may be `x`.
void rms_norm_row(const float* x, const float* weight, float eps, int64_t width, float* out);

void add_row(const float* a, const float* b, int64_t width, float* out);

// out = activation(x[:width]) * x[width:]; activation 0 is SiLU, 1 GELU (tanh form).
void gated_row(const float* x, int64_t width, int activation, float* out);

// Rotates the halves of one head in place.
void rotate_head(float* head, const float* cosine, const float* sine, int64_t dim);

void to_bf16_row(const float* x, int64_t width, uint16_t* out);

// The paged cache of one layer. Pages hold `page_size` tokens, a multiple of 16.
// keys:   [page][kv head][page_size / 16][dim / 2][16][2] bf16 (a register per pair of dims)
// values: [page][kv head][page_size][dim] bf16
struct LayerCache {
  uint16_t* keys;
  uint16_t* values;
  int64_t page_size, heads, dim;

  int64_t page_elements() const { return heads * page_size * dim; }
};

void write_key(const LayerCache& cache, int64_t slot, int64_t head, const float* key);
void write_value(const LayerCache& cache, int64_t slot, int64_t head, const float* value);

// Attention of `rows` query rows (bf16 `[dim]` each, all of one kv head, at `positions`) over one
// sequence's pages. `out[row]` are fp32 `[dim]`. At most kQueryRows rows.
constexpr int kQueryRows = 24;
constexpr int kMaxDim = 256;
void attend(const LayerCache& cache, const int32_t* pages, int64_t head, int rows,
            const uint16_t* const* queries, const int64_t* positions, float scale, int64_t window,
            float* const* out);

// How one row's distribution is narrowed; see kernels/sampling.py.
struct Filters {
  float temperature;
  int32_t top_k;  // 0 is off
  float top_p;
  float min_p;
  double uniform;  // in [0, 1), the draw's only randomness
};

// The likeliest token, the first of equals.
int64_t argmax(const float* logits, int64_t vocab);
// One draw from the filtered distribution of one row.
int64_t draw(const float* logits, int64_t vocab, const Filters& filters);

// Whether this processor has every instruction that the kernels use.
bool supported();

}  // namespace ryzanstein
