// Multi-head latent attention, but for attention itself, which sees one head of keys: what makes its queries, and
// values of what it mixes.
#include <cstring>
#include <stdexcept>

#include "program.h"

namespace ryzanstein {
namespace {

// Rows for which a thread reads a head's weights once.
constexpr int64_t kHeadRows = 16;

}  // namespace

void Program::add_head_linear(int in, int out, const Weight& weight, int heads) {
  if (weight.format != Format::kF32 && weight.format != Format::kBf16) {
    throw std::invalid_argument("heads' own weights are float ones");
  }
  Instruction i;
  i.op = Op::kHeadLinear;
  i.in = in;
  i.out = out;
  i.heads = heads;
  i.parts = std::make_shared<std::vector<Weight>>(parts_of(weight, heads));
  add(std::move(i));
}

void Program::head_linear_step(const Instruction& i, const Batch& batch) {
  const Value &in = values_[i.in], &out = values_[i.out];
  const int64_t begin = batch.first_token, rows = rows_of(i.in, batch) - begin;
  if (rows == 0) return;
  const std::vector<Weight>& parts = *i.parts;
  const int64_t columns = parts[0].columns, outputs = parts[0].rows;
  const int64_t given = in.width / i.heads, blocks = (rows + kHeadRows - 1) / kHeadRows;
  const bool pairs = parts[0].format == Format::kBf16 && kernels_.rounds_pairs;
  share_out(batch, 0, i.heads * blocks, 1, [&](int64_t first, int64_t last) {
    // A head's inputs side by side, also in pairs, and its outputs.
    float* const x = scratch(kHeadRows * (2 * columns + outputs));
    float* const y = x + 2 * kHeadRows * columns;
    Activations inputs;
    inputs.floats = x;
    inputs.bf16 = pairs ? reinterpret_cast<uint16_t*>(x + kHeadRows * columns) : nullptr;
    for (int64_t n = first; n < last; ++n) {
      const int64_t head = n / blocks, row = begin + n % blocks * kHeadRows;
      const int64_t count = std::min(kHeadRows, begin + rows - row);
      for (int64_t r = 0; r < count; ++r) {
        float* const own = x + r * columns;
        std::memcpy(own, in.floats.get() + (row + r) * in.width + head * given,
                    static_cast<size_t>(columns) * sizeof(float));
        if (pairs) kernels_.store_forms(own, columns, r, inputs);
      }
      const Weight& weight = parts[static_cast<size_t>(head)];
      kernels_.matmul(weight, inputs, 0, count, nullptr, y, 0, weight.tiles(), Soon{});
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(out.floats.get() + (row + r) * out.width + head * outputs, y + r * outputs,
                    static_cast<size_t>(outputs) * sizeof(float));
      }
    }
  });
  make_forms(out, begin + rows, batch);
}

void Program::latent_step(const Instruction& i, const Batch& batch) {
  const Value &absorbed = values_[i.in], &q = values_[i.in2], &kv = values_[i.in3], &out = values_[i.out];
  const LayerCache& cache = caches_[i.layer];
  const int64_t rank = i.window, plain = i.first, turned = cache.dim - rank;
  share_out(batch, batch.first_token, batch.tokens, kRowGrain, [&](int64_t first, int64_t last) {
    float* const vector = scratch(cache.dim);
    for (int64_t row = first; row < last; ++row) {
      const float* const cosine = i.cosine + batch.positions[row] * (turned / 2);
      const float* const sine = i.sine + batch.positions[row] * (turned / 2);
      const size_t tail = static_cast<size_t>(turned) * sizeof(float);
      const float* const given = kv.floats.get() + row * kv.width;
      kernels_.rms_norm_row(given, i.vector, i.scalar, rank, vector);
      std::memcpy(vector + rank, given + rank, tail);
      kernels_.rotate_head(vector + rank, cosine, sine, turned);
      kernels_.write_key(cache, batch.kv_slots[row], 0, vector);
      kernels_.write_value(cache, batch.kv_slots[row], 0, vector);
      for (int64_t h = 0; h < i.heads; ++h) {
        float* const query = out.floats.get() + row * out.width + h * cache.dim;
        std::memcpy(query, absorbed.floats.get() + row * absorbed.width + h * rank,
                    static_cast<size_t>(rank) * sizeof(float));
        std::memcpy(query + rank, q.floats.get() + row * q.width + h * (plain + turned) + plain, tail);
        kernels_.rotate_head(query + rank, cosine, sine, turned);
      }
    }
  });
}

}  // namespace ryzanstein
