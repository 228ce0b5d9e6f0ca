// A recorded forward pass: instructions over preallocated buffers, the row counts as run-time values.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace ryzanstein {

// The step's inputs; arrays as in kernels/batch.py.
struct Batch {
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* kv_slots;
  const int32_t* query_starts;
  const int32_t* context_lengths;
  const int32_t* table_rows;
  const int32_t* page_table;
  const int64_t* sample_rows;
  int64_t tokens, sequences, samples, table_width;
};

class Program {
 public:
  // Buffers hold up to `max_rows` rows. `logits` is where the last linear writes.
  Program(std::shared_ptr<Pool> pool, int64_t max_rows);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // A buffer of `width` values a row, in the forms that its readers want.
  int add_buffer(int64_t width, bool floats, bool int8, bool bf16);
  // The paged cache of the next layer; memory stays with the caller.
  void add_cache(uint16_t* keys, uint16_t* values, int64_t page_size, int64_t heads, int64_t dim);

  void embed(int out, std::shared_ptr<Weight> table, float scale);
  void rms_norm(int in, int out, const float* weight, float eps);
  void add_rms_norm(int in, int residual, int out, int sum, const float* weight, float eps);
  void linear(int in, int out, std::shared_ptr<Weight> weight, const float* bias);
  void rope_write_kv(int in, int out, int layer, int query_heads, const float* cosine,
                     const float* sine, const float* query_norm, const float* key_norm, float eps);
  void attention(int in, int out, int layer, int query_heads, float scale, int64_t window);
  void gated(int in, int out, int activation);
  void select_rows(int in, int out);
  void logits(int in, std::shared_ptr<Weight> weight, const float* bias, float* out);

  void run(const Batch& batch);

  enum class Op {
    kEmbed, kRmsNorm, kAddRmsNorm, kLinear, kRopeWriteKv, kAttention, kGated, kSelectRows
  };
  static constexpr int kOps = 8;

  // Nanoseconds spent in each kind of instruction since profiling began.
  void profile(bool on) {
    profiling_ = on;
    nanoseconds_.fill(0);
  }
  const std::array<int64_t, kOps>& nanoseconds() const { return nanoseconds_; }

 private:

  struct Value {
    int64_t width;
    Buffer<float> floats;
    Buffer<int8_t> values;
    Buffer<float> scales, sums;
    Buffer<int32_t> counts;
    Buffer<uint16_t> bf16;
    bool samples = false;  // rows are the sampled ones

    Quantized quantized() const {
      return {values.get(), scales.get(), sums.get(), counts.get(), bf16.get()};
    }
  };

  struct Instruction {
    explicit Instruction(Op which) : op(which) {}

    Op op;
    int in = -1, in2 = -1, out = -1, out2 = -1;
    std::shared_ptr<Weight> weight;
    const float *vector = nullptr, *vector2 = nullptr, *cosine = nullptr, *sine = nullptr;
    float* target = nullptr;
    float scalar = 0.0f;
    int layer = 0, heads = 0, activation = 0;
    int64_t window = 0;
  };

  void step(const Instruction& i, const Batch& batch);
  void linear_step(const Instruction& i, int64_t rows);
  void rope_step(const Instruction& i, const Batch& batch);
  void attention_step(const Instruction& i, const Batch& batch);
  // Finishes a row that was computed into `row_values`: stores it in every form of `value`.
  static void store_row(const Value& value, int64_t row, const float* row_values);
  int64_t rows_of(int value, const Batch& batch) const;

  std::shared_ptr<Pool> pool_;
  int64_t max_rows_;
  std::vector<Value> values_;
  std::vector<LayerCache> caches_;
  std::vector<Instruction> instructions_;
  bool profiling_ = false;
  std::array<int64_t, kOps> nanoseconds_{};
};

}  // namespace ryzanstein
