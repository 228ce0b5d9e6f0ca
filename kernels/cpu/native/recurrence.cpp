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

void Program::add_short_conv(int in, int out, int layer, const float* taps, int channels) {
  Instruction i;
  i.op = Op::kShortConv;
  i.in = in;
  i.out = out;
  i.layer = layer;
  i.delta = std::make_shared<Delta>(Delta{taps, nullptr, nullptr, channels, -1});
  add(std::move(i));
}

const std::vector<int64_t>& Program::sequences_of(const Batch& batch) {
  static thread_local std::vector<int64_t> found;
  found.resize(static_cast<size_t>(batch.tokens));
  for (int64_t n = 0; n < batch.sequences; ++n) {
    std::fill(found.begin() + batch.query_starts[n], found.begin() + batch.query_starts[n + 1], n);
  }
  return found;
}

void Program::convolve(const Instruction& i, const Batch& batch, int64_t sequence, int64_t row,
                       const Value& from, bool activated, float* out) const {
  const LayerStates& s = states_[static_cast<size_t>(i.layer)];
  const int64_t width = from.width, start = batch.query_starts[sequence];
  const float* before = s.inputs + batch.table_rows[sequence] * s.input_size();
  const float* inputs[kMostTaps];
  for (int64_t t = 0; t < s.taps; ++t) {
    const int64_t at = row - (s.taps - 1 - t);
    inputs[t] = at >= start ? from.floats.get() + at * width
                : batch.positions[start] == 0
                    ? zeros(width)
                    : before + (s.taps - 1 + at - start) * width;
  }
  kernels_.convolve_row(inputs, i.delta->taps, static_cast<int>(s.taps), width, activated, out);
}

// A row's channels and gates: what the rule takes, from the row's inputs and those before it.
void Program::prepare_delta(const Instruction& i, const Batch& batch, int64_t sequence,
                            int64_t row) {
  const Delta& d = *i.delta;
  const LayerStates& s = states_[static_cast<size_t>(i.layer)];
  const Value &in = values_[i.in], &gates = values_[i.in2];
  const Value &channels = values_[d.channels], &shares = values_[d.shares];
  float* x = channels.floats.get() + row * channels.width;
  convolve(i, batch, sequence, row, in, true, x);
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
void Program::keep_inputs(const LayerStates& s, const Value& in, const Batch& batch,
                          int64_t sequence) const {
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
  const std::vector<int64_t>& whose = sequences_of(batch);
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
    for (int64_t n = first; n < last; ++n) keep_inputs(s, values_[i.in], batch, n);
  });
  make_forms(values_[i.out], batch.tokens, batch);
}

void Program::short_conv_step(const Instruction& i, const Batch& batch) {
  const Value &in = values_[i.in], &out = values_[i.out], &inputs = values_[i.delta->channels];
  const int64_t width = out.width;
  const std::vector<int64_t>& whose = sequences_of(batch);
  pool_->run(batch.tokens, kRowGrain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* x = in.floats.get() + row * in.width;
      kernels_.multiply_row(x, x + 2 * width, width, inputs.floats.get() + row * width);
    }
  });
  pool_->run(batch.tokens, kRowGrain, [&](int64_t first, int64_t last) {
    float* row_values = scratch(width);
    for (int64_t row = first; row < last; ++row) {
      convolve(i, batch, whose[static_cast<size_t>(row)], row, inputs, false, row_values);
      kernels_.multiply_row(row_values, in.floats.get() + row * in.width + width, width, row_values);
      store_row(out, row, row_values);
    }
  });
  const LayerStates& s = states_[static_cast<size_t>(i.layer)];
  pool_->run(batch.sequences, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) keep_inputs(s, inputs, batch, n);
  });
}

}  // namespace ryzanstein
