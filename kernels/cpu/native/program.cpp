#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace ryzanstein {
namespace {

constexpr int64_t kMaxWidth = 1 << 18;

// Rows a thread from which a matmul is shared out by rows.
constexpr int64_t kSplitRows = 24;
// Pieces that a thread takes of it, one by one.
constexpr int64_t kLinearPieces = 8;

// What norms over all queries, and over all keys, multiply a row by; in the order of the heads.
void factors_of(const float* squares, int64_t heads, const Instruction& rope, int64_t dim, float* factors) {
  const int64_t counts[2] = {heads, rope.window};
  for (int part = 0; part < 2; ++part) {
    float sum = 0.0f;
    for (int64_t h = 0; h < heads; ++h) sum += squares[2 * h + part];
    factors[part] = 1.0f / std::sqrt(sum / static_cast<float>(counts[part] * dim) + rope.scalar);
  }
}

}  // namespace

float* scratch(int64_t width) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < width) buffer.resize(static_cast<size_t>(width));
  return buffer.data();
}

const float* zeros(int64_t width) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < width) buffer.resize(static_cast<size_t>(width));
  return buffer.data();
}

Activations Program::Value::activations() const {
  return {floats.get(), bf16.get(), groups.get(), row_values.get(), row_scales.get(), row_offsets.get()};
}

Program::Program(std::shared_ptr<Pool> pool, const Kernels* kernels, int64_t max_rows,
                 std::shared_ptr<Exchange> exchange)
    : pool_(std::move(pool)),
      kernels_(*kernels),
      max_rows_(max_rows),
      exchange_(std::move(exchange)),
      readings_(static_cast<size_t>(pool_->threads()) + 1) {}

int Program::add_buffer(int64_t width, bool floats, bool groups, bool whole, bool bf16,
                        int64_t times) {
  if (width <= 0 || width > kMaxWidth) throw std::invalid_argument("buffer width out of range");
  Value value;
  value.width = width;
  const size_t rows = static_cast<size_t>(max_rows_ * times), count = rows * static_cast<size_t>(width);
  if (floats) value.floats = allocate<float>(count);
  if (bf16) value.bf16 = allocate<uint16_t>(count);
  if (groups) value.groups = allocate<Activations::Group>(rows * static_cast<size_t>(width / kGroup));
  if (whole) {
    value.row_values = allocate<int8_t>(rows * static_cast<size_t>(Activations::row_stride(width)));
    value.row_scales = allocate<float>(rows);
    value.row_offsets = allocate<int32_t>(rows);
  }
  values_.push_back(std::move(value));
  return static_cast<int>(values_.size()) - 1;
}

void Program::add_cache(const LayerCache& cache) {
  if (!cache.fits()) {
    throw std::invalid_argument("the kernels do not take this shape of cache");
  }
  caches_.push_back(cache);
}

void Program::add(Instruction i) {
  if ((i.op == Op::kAllReduce || i.op == Op::kAllGather) && !exchange_) {
    throw std::invalid_argument("a program of one rank has no collectives");
  }
  if (i.out >= 0) {
    values_[i.out].samples =
        i.op == Op::kSelectRows || (i.in >= 0 && values_[i.in].samples);
  }
  const int number = static_cast<int>(instructions_.size());
  if (i.op == Op::kAttention) plan_reading(number);
  if (i.op == Op::kLinear && i.out >= 0) linears_.push_back(number);
  if (i.op == Op::kLinear) {
    if (last_linear_ >= 0) instructions_[static_cast<size_t>(last_linear_)].next_linear = number;
    last_linear_ = number;
  }
  if (i.out2 >= 0) values_[i.out2].samples = values_[i.in].samples;
  instructions_.push_back(std::move(i));
  row_cost_ = 0.0;
}

void Program::copy_page(const PageCopy& copy) {
  const Pool::Awake awake(*pool_);
  const auto copy_part = [&](void* part, int64_t bytes) {
    uint8_t* const pages = static_cast<uint8_t*>(part);
    if (bytes > 0) std::memcpy(pages + copy.target * bytes, pages + copy.source * bytes, static_cast<size_t>(bytes));
  };
  pool_->run(static_cast<int64_t>(caches_.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const LayerCache& layer = caches_[static_cast<size_t>(n)];
      if (layer.windowed != copy.windowed) continue;
      const int64_t vectors = layer.heads * layer.page_size;
      copy_part(layer.keys, vectors * layer.vector_bytes());
      copy_part(layer.values, vectors * layer.vector_bytes());
      copy_part(layer.key_scales, vectors * layer.scale_bytes());
      copy_part(layer.value_scales, vectors * layer.scale_bytes());
    }
  });
}

void Program::run(const Batch& batch) {
  if (batch.tokens > max_rows_ || batch.samples > max_rows_) {
    throw std::invalid_argument("the step has more rows than the program's buffers");
  }
  const Pool::Awake awake(*pool_);
  for (Reading& reading : readings_) reading.pages.clear();
  const std::vector<Batch> strands = strands_of(batch);
  strands_ = static_cast<int>(strands.size());
  samples_ = batch.samples;
  run_strands(strands);
  for (size_t n = strands.empty() ? 0 : strand_end_; n < instructions_.size(); ++n) {
    const Instruction& instruction = instructions_[n];
    if (!profiling_) {
      step(instruction, batch);
      continue;
    }
    const auto start = std::chrono::steady_clock::now();
    step(instruction, batch);
    const auto spent = std::chrono::steady_clock::now() - start;
    nanoseconds_[static_cast<size_t>(instruction.op)] +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
  }
}

int64_t Program::rows_of(int value, const Batch& batch) const {
  return values_[value].samples ? batch.samples : batch.tokens;
}

void Program::store_row(const Value& value, int64_t row, const float* row_values) const {
  if (value.floats) {
    std::memcpy(value.floats.get() + row * value.width, row_values,
                static_cast<size_t>(value.width) * sizeof(float));
  }
  kernels_.store_forms(row_values, value.width, row, value.activations());
}

void Program::step(const Instruction& i, const Batch& batch) {
  switch (i.op) {
    case Op::kLinear: return linear_step(i, batch);
    case Op::kRopeWriteKv: return rope_step(i, batch);
    case Op::kHeadLinear: return head_linear_step(i, batch);
    case Op::kWriteLatent: return latent_step(i, batch);
    case Op::kSoftcap: return softcap_step(i, batch.samples);
    case Op::kAttention: return attention_step(i, batch);
    case Op::kDelta: return delta_step(i, batch);
    case Op::kShortConv: return short_conv_step(i, batch);
    case Op::kExperts: return experts_step(i, rows_of(i.in, batch));
    case Op::kAllReduce:
    case Op::kAllGather: return collective_step(i, rows_of(i.in, batch), batch);
    default: break;
  }
  const Value& out = values_[i.out];
  const Value* in = i.in >= 0 ? &values_[i.in] : nullptr;
  const int64_t rows = rows_of(i.out, batch), width = out.width;
  share_out(batch, batch.first_token, rows, kRowGrain, [&](int64_t first, int64_t last) {
    float* row_values = scratch(width);
    for (int64_t row = first; row < last; ++row) {
      const float* x = in ? in->floats.get() + row * in->width : nullptr;
      switch (i.op) {
        case Op::kEmbed: {
          const int64_t index = batch.token_ids[row] - i.first;
          if (index >= 0 && index < i.weight->rows) {
            kernels_.embed_row(*i.weight, index, i.scalar, row_values);
          } else {
            std::fill_n(row_values, width, 0.0f);
          }
          break;
        }
        case Op::kRmsNorm:
          for (int64_t part = 0; part < width; part += i.window) {
            kernels_.rms_norm_row(x + part, i.vector, i.scalar, i.window, row_values + part);
          }
          break;
        case Op::kAdd:
          kernels_.add_row(x, values_[i.in2].floats.get() + row * width, width, row_values);
          break;
        case Op::kAddRmsNorm: {
          const Value& sum = values_[i.out2];
          float* total = sum.floats ? sum.floats.get() + row * width : row_values;
          kernels_.add_row(x, values_[i.in2].floats.get() + row * width, width, total);
          if (i.factor != 1.0f) {
            for (int64_t n = 0; n < width; ++n) total[n] *= i.factor;
          }
          kernels_.rms_norm_row(total, i.vector, i.scalar, width, row_values);
          break;
        }
        case Op::kSumParts:
          std::copy_n(x, width, row_values);
          for (int64_t part = width; part < in->width; part += width) {
            kernels_.add_row(row_values, x + part, width, row_values);
          }
          break;
        case Op::kGatedNorm:
          for (int64_t part = 0; part < width; part += i.window) {
            kernels_.rms_norm_row(x + part, i.vector, i.scalar, i.window, row_values + part);
          }
          kernels_.gate_row(row_values, values_[i.in2].floats.get() + row * width, width, 1,
                            row_values);
          break;
        case Op::kGate:
          kernels_.gate_row(x + i.first, values_[i.in2].floats.get() + row * width, width,
                            i.activation, row_values);
          break;
        case Op::kHeadSquares: square_heads(i, x, row_values); break;
        case Op::kGated: kernels_.gated_row(x, width, i.activation, row_values); break;
        default:
          std::memcpy(row_values, in->floats.get() + batch.sample_rows[row] * width,
                      static_cast<size_t>(width) * sizeof(float));
      }
      store_row(out, row, row_values);
    }
  });
}

void Program::linear_step(const Instruction& i, const Batch& batch) {
  const int64_t begin = batch.first_token, rows = rows_of(i.in, batch) - begin;
  if (rows == 0) return;
  const Weight& weight = *i.weight;
  float* out = i.target ? i.target : values_[i.out].floats.get();
  const Activations x = values_[i.in].activations();
  const auto [blocks, pieces] = shares_of(i, batch);
  const std::vector<Soon::Piece>& cached = read_soon(i, batch);
  const int64_t count = static_cast<int64_t>(cached.size()), jobs = blocks * pieces;
  share_out(batch, 0, jobs, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      // The same share of it as of the work, since a thread attends to the same share of the sequences.
      const int64_t fetched = count * n / jobs;
      const Soon soon{cached.data() + fetched, count * (n + 1) / jobs - fetched,
                      first_tiles(i, n, jobs, batch)};
      const int64_t block = n / pieces, piece = n % pieces;
      const int64_t row = begin + rows * block / blocks, end = begin + rows * (block + 1) / blocks;
      kernels_.matmul(weight, x, row, end - row, i.vector, out, weight.cut(piece, pieces),
                      weight.cut(piece + 1, pieces), soon);
    }
  });
}

Program::Shares Program::shares_of(const Instruction& linear, const Batch& batch) const {
  const int64_t rows = rows_of(linear.in, batch) - batch.first_token, tiles = linear.weight->tiles();
  // Many rows are shared out by rows, so that what a thread wrote is what it reads next; few rows by
  // outputs, so that every weight is read once.
  const int64_t threads = threads_of(batch);
  const int64_t blocks = rows >= kSplitRows * threads ? threads : 1;
  // Several pieces a thread, but none so small that fetching it costs more than computing it.
  const int64_t least = std::max<int64_t>(2, 8 * blocks / std::max<int64_t>(1, rows));
  const int64_t pieces = std::min(threads * kLinearPieces / blocks, tiles / least);
  // As many for each.
  const int64_t odd = pieces > threads && blocks == 1 ? pieces % threads : 0;
  return {blocks, std::max<int64_t>(1, pieces - odd)};
}

Soon::Piece Program::first_tiles(const Instruction& linear, int64_t piece, int64_t pieces, const Batch& batch) const {
  const int64_t threads = threads_of(batch), thread = Pool::thread_of(pieces, piece, threads);
  const bool last = Pool::first_of(pieces, thread + 1, threads) == piece + 1;
  if (linear.next_linear < 0 || !last) return {nullptr, nullptr};
  const Instruction& next = instructions_[static_cast<size_t>(linear.next_linear)];
  const Shares shares = shares_of(next, batch);
  const int64_t first = Pool::first_of(shares.blocks * shares.pieces, thread, threads) % shares.pieces;
  const Weight& weight = *next.weight;
  return {weight.tile(weight.cut(first, shares.pieces)), weight.data + weight.bytes};
}

void Program::square_heads(const Instruction& i, const float* x, float* squares) const {
  const int64_t dim = i.window, share = i.kv_heads ? i.heads / i.kv_heads : 0;
  for (int64_t h = 0; h < i.heads; ++h) {
    squares[2 * h] = kernels_.squared_norm(x + h * dim, dim);
    const bool first = share && h % share == 0;
    squares[2 * h + 1] = first ? kernels_.squared_norm(x + (i.heads + h / share) * dim, dim) : 0.0f;
  }
}

void Program::rope_step(const Instruction& i, const Batch& batch) {
  const Value& in = values_[i.in];
  const Value* squares = i.in2 >= 0 ? &values_[i.in2] : nullptr;
  const Value& out = values_[i.out];
  const LayerCache& cache = caches_[i.layer];
  const int64_t* slots = cache.windowed ? batch.window_slots : batch.kv_slots;
  const int64_t dim = cache.dim, half = dim / 2;
  share_out(batch, batch.first_token, batch.tokens, kRowGrain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* head = in.floats.get() + row * in.width;
      const float* cosine = i.cosine + batch.positions[row] * half;
      const float* sine = i.sine + batch.positions[row] * half;
      float factors[2];
      if (squares) factors_of(squares->floats.get() + row * squares->width, squares->width / 2, i, dim, factors);
      for (int64_t h = 0; h < i.heads + i.kv_heads; ++h, head += dim) {
        const float* norm = h < i.heads ? i.vector : i.vector2;
        if (squares) {
          kernels_.scale_row(head, norm + (h < i.heads ? h : h - i.heads) * dim, factors[h >= i.heads], dim, head);
        } else if (norm) {
          kernels_.rms_norm_row(head, norm, i.scalar, dim, head);
        }
        kernels_.rotate_head(head, cosine, sine, dim);
        if (h < i.heads) {
          float* query = out.floats.get() + row * out.width + h * dim;
          std::memcpy(query, head, static_cast<size_t>(dim) * sizeof(float));
          if (i.growth) {
            const float factor = i.growth[batch.positions[row]];
            for (int64_t n = 0; n < dim; ++n) query[n] *= factor;
          }
        } else {
          kernels_.write_key(cache, slots[row], h - i.heads, head);
        }
      }
      for (int64_t h = 0; h < i.kv_heads; ++h, head += dim) {
        if (i.vector3) kernels_.rms_norm_row(head, i.vector3, i.scalar, dim, head);
        kernels_.write_value(cache, slots[row], h, head);
      }
    }
  });
}

void Program::softcap_step(const Instruction& i, int64_t rows) const {
  // A vocabulary's logits are many for one row.
  constexpr int64_t kColumns = 4096;
  const int64_t pieces = (i.window + kColumns - 1) / kColumns;
  pool_->run(rows * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t column = n % pieces * kColumns;
      float* logits = i.target + n / pieces * i.window + column;
      kernels_.softcap_row(i.scalar, std::min(kColumns, i.window - column), logits);
    }
  });
}

void Program::attention_step(const Instruction& i, const Batch& batch) {
  const Value& in = values_[i.in];
  const Value& out = values_[i.out];
  const LayerCache& cache = caches_[i.layer];
  const int32_t* table = cache.windowed ? batch.window_table : batch.page_table;
  const int64_t dim = cache.dim, share = i.heads / cache.heads;
  const int64_t most = tokens_a_task(share);
  struct Task {
    int64_t sequence, first, count;
  };
  static thread_local std::vector<Task> tasks;
  tasks.clear();
  for (int64_t s = batch.first_sequence; s < batch.sequences; ++s) {
    for (int64_t t = batch.query_starts[s]; t < batch.query_starts[s + 1]; t += most) {
      tasks.push_back({s, t, std::min<int64_t>(most, batch.query_starts[s + 1] - t)});
    }
  }
  const std::vector<Task>& list = tasks;
  share_out(batch, 0, static_cast<int64_t>(list.size()) * cache.heads, 1, [&](int64_t first, int64_t last) {
    const float* queries[kQueryRows];
    int64_t positions[kQueryRows];
    float sinks[kQueryRows];
    float* targets[kQueryRows];
    for (int64_t n = first; n < last; ++n) {
      const Task& task = list[static_cast<size_t>(n / cache.heads)];
      const int64_t head = n % cache.heads;
      const int32_t* pages = table + batch.table_rows[task.sequence] * batch.table_width;
      for (int64_t part = 0; part < share; part += kQueryRows) {
        int rows = 0;
        for (int64_t t = 0; t < task.count; ++t) {
          for (int64_t h = part; h < std::min<int64_t>(share, part + kQueryRows); ++h, ++rows) {
            const int64_t at = (task.first + t) * in.width + (head * share + h) * dim;
            queries[rows] = in.floats.get() + at;
            positions[rows] = batch.positions[task.first + t];
            if (i.vector) sinks[rows] = i.vector[head * share + h];
            targets[rows] = out.floats.get() + at;
          }
        }
        kernels_.attend(cache, pages, head, rows, queries, positions, i.vector ? sinks : nullptr,
                        i.scalar, i.window, targets);
      }
    }
  });
  make_forms(out, batch.tokens, batch);
}

void Program::collective_step(const Instruction& i, int64_t rows, const Batch& batch) {
  const Value& in = values_[i.in];
  float* out = i.target ? i.target : values_[i.out].floats.get();
  if (i.op == Op::kAllReduce) {
    exchange_->sum(*pool_, in.floats.get(), rows, in.width, out);
  } else {
    exchange_->gather(*pool_, in.floats.get(), rows, i.widths, out);
  }
  if (i.out >= 0) make_forms(values_[i.out], rows, batch);
}

void Program::make_forms(const Value& value, int64_t rows, const Batch& batch) const {
  if (!value.groups && !value.row_values && !value.bf16) return;
  share_out(batch, batch.first_token, rows, kRowGrain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* floats = value.floats.get() + row * value.width;
      kernels_.store_forms(floats, value.width, row, value.activations());
    }
  });
}

}  // namespace ryzanstein
