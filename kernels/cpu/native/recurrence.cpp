// Layers that keep a state of one size for each sequence, instead of keys and values.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "program.h"

namespace ryzanstein {
namespace {

constexpr int kMostTaps = 16;

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

}  // namespace

void Program::add_states(const LayerStates& states) {
  if (states.key_dim % 16 || states.value_dim % 16 || states.taps < 2 || states.taps > kMostTaps) {
    throw std::invalid_argument("the kernels do not take this shape of states");
  }
  states_.push_back(states);
}

void Program::add_delta(int in, int gates, int out, int layer, const float* taps,
                        const float* decay, const float* offset, int channels, int shares) {
  Instruction i;
  i.op = Op::kDelta;
  i.in = in;
  i.in2 = gates;
  i.out = out;
  i.layer = layer;
  i.delta = std::make_shared<Delta>(Delta{taps, decay, offset, channels, shares});
  add(std::move(i));
}

// A row's channels and gates: what the rule takes, from the row's inputs and those before it.
void Program::prepare_delta(const Instruction& i, const Batch& batch, int64_t sequence,
                            int64_t row) {
  const Delta& d = *i.delta;
  const LayerStates& s = states_[static_cast<size_t>(i.layer)];
  const Value &in = values_[i.in], &gates = values_[i.in2];
  const Value &channels = values_[d.channels], &shares = values_[d.shares];
  const int64_t width = in.width, start = batch.query_starts[sequence];
  const float* before = s.inputs + batch.table_rows[sequence] * s.input_size();
  const float* inputs[kMostTaps];
  for (int64_t t = 0; t < s.taps; ++t) {
    const int64_t at = row - (s.taps - 1 - t);
    inputs[t] = at >= start ? in.floats.get() + at * width
                : batch.positions[start] == 0
                    ? zeros(width)
                    : before + (s.taps - 1 + at - start) * width;
  }
  float* x = channels.floats.get() + row * width;
  kernels_.convolve_row(inputs, d.taps, static_cast<int>(s.taps), width, x);
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.key_dim));
  for (int64_t h = 0; h < 2 * s.key_heads; ++h) {
    kernels_.unit_row(x + h * s.key_dim, s.key_dim, h < s.key_heads ? scale : 1.0f);
  }
  const float* from = gates.floats.get() + row * gates.width;
  float* to = shares.floats.get() + row * shares.width;
  for (int64_t h = 0; h < s.value_heads; ++h) {
    to[h] = std::exp(-d.decay[h] * softplus(from[s.value_heads + h] + d.offset[h]));
    to[s.value_heads + h] = 1.0f / (1.0f + std::exp(-from[h]));
  }
}

// One head of a sequence's chunk.
void Program::delta_head(const Instruction& i, const Batch& batch, int64_t sequence, int64_t head) {
  const Delta& d = *i.delta;
  const LayerStates& s = states_[static_cast<size_t>(i.layer)];
  const Value &channels = values_[d.channels], &shares = values_[d.shares], &out = values_[i.out];
  const int64_t start = batch.query_starts[sequence], size = s.key_dim * s.value_dim;
  const auto memory_at = [&](int64_t place) {
    return s.memory + (place * s.value_heads + head) * size;
  };
  DeltaRun run;
  run.memory = memory_at(batch.table_rows[sequence]);
  run.key_dim = s.key_dim;
  run.value_dim = s.value_dim;
  run.tokens = batch.query_starts[sequence + 1] - start;
  const int64_t key = s.tiled ? head % s.key_heads : head / (s.value_heads / s.key_heads);
  const float* x = channels.floats.get() + start * channels.width;
  run.queries = x + key * s.key_dim;
  run.keys = x + (s.key_heads + key) * s.key_dim;
  run.values = x + 2 * s.key_heads * s.key_dim + head * s.value_dim;
  run.stride = channels.width;
  run.gates = shares.floats.get() + start * shares.width + head;
  run.gate_stride = shares.width;
  run.share_at = s.value_heads;
  run.out = out.floats.get() + start * out.width + head * s.value_dim;
  run.out_stride = out.width;
  run.kept = batch.kept_rows ? batch.kept_rows[sequence] : -1;
  run.kept_memory = run.kept >= 0 ? memory_at(batch.kept_at[sequence]) : nullptr;
  if (batch.positions[start] == 0) std::fill_n(run.memory, size, 0.0f);
  kernels_.delta_head(run);
}

// The last inputs of a sequence's channels, for its next tokens and where they are to be kept.
void Program::keep_inputs(const Instruction& i, const Batch& batch, int64_t sequence) {
  const LayerStates& s = states_[static_cast<size_t>(i.layer)];
  const Value& in = values_[i.in];
  const int64_t width = in.width, held = s.taps - 1, start = batch.query_starts[sequence];
  const int64_t tokens = batch.query_starts[sequence + 1] - start;
  float* state = s.inputs + batch.table_rows[sequence] * s.input_size();
  if (batch.positions[start] == 0) std::fill_n(state, s.input_size(), 0.0f);
  // Those behind the first `count` of the chunk's rows.
  const auto copy = [&](int64_t count, float* target) {
    for (int64_t n = 0; n < held; ++n) {
      const int64_t at = count - held + n;
      const float* from = at >= 0 ? in.floats.get() + (start + at) * width : state + (held + at) * width;
      std::memmove(target + n * width, from, static_cast<size_t>(width) * sizeof(float));
    }
  };
  if (batch.kept_rows && batch.kept_rows[sequence] >= 0) {
    copy(batch.kept_rows[sequence], s.inputs + batch.kept_at[sequence] * s.input_size());
  }
  copy(tokens, state);
}

void Program::delta_step(const Instruction& i, const Batch& batch) {
  const LayerStates& s = states_[static_cast<size_t>(i.layer)];
  static thread_local std::vector<int64_t> sequence_of;
  sequence_of.resize(static_cast<size_t>(batch.tokens));
  for (int64_t n = 0; n < batch.sequences; ++n) {
    std::fill(sequence_of.begin() + batch.query_starts[n],
              sequence_of.begin() + batch.query_starts[n + 1], n);
  }
  const std::vector<int64_t>& whose = sequence_of;
  pool_->run(batch.tokens, kRowGrain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      prepare_delta(i, batch, whose[static_cast<size_t>(row)], row);
    }
  });
  pool_->run(batch.sequences * s.value_heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      delta_head(i, batch, n / s.value_heads, n % s.value_heads);
    }
  });
  pool_->run(batch.sequences, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) keep_inputs(i, batch, n);
  });
  make_forms(values_[i.out], batch.tokens);
}

}  // namespace ryzanstein
