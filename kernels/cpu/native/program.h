// A recorded forward pass: instructions over preallocated buffers, the row counts as run-time values.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "exchange.h"
#include "kernels.h"
#include "pool.h"

namespace ryzanstein {

// Rows of cheap work that one thread takes at a time.
constexpr int64_t kRowGrain = 4;
// Rows of a chunk that attention takes together, if so many heads share a key.
inline int64_t tokens_a_task(int64_t share) { return std::max<int64_t>(1, kQueryRows / share); }
// Equal parts stacked in a weight, each a weight of its own in the same memory.
std::vector<Weight> parts_of(const Weight& whole, int64_t count);
// A thread's room for a row of `width` values, and a row of zeros.
float* scratch(int64_t width);
const float* zeros(int64_t width);

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
  const int32_t* kept_rows;  // null where no layer keeps a state
  const int32_t* kept_at;
  const int64_t* window_slots;  // null where all layers share their pages
  const int32_t* window_table;
  // Of a strand: where its rows and chunks begin; `tokens` and `sequences` are where they end.
  int64_t first_token = 0, first_sequence = 0;
  int strand = Pool::kNoStrand;
};

struct PageCopy {
  int64_t source, target;
  bool windowed;
};

enum class Op {
  kEmbed, kRmsNorm, kAddRmsNorm, kLinear, kRopeWriteKv, kAttention, kGated, kSelectRows,
  kAllReduce, kAllGather, kExperts, kSumParts, kDelta, kGatedNorm, kGate, kShortConv, kAdd, kSoftcap,
  kHeadLinear, kWriteLatent, kHeadSquares
};
constexpr std::array<const char*, 21> kOpNames = {
    "embed", "rms_norm", "add_rms_norm", "linear", "rope_write_kv", "attention", "gated",
    "select_rows", "all_reduce", "all_gather", "experts", "sum_parts", "delta",
    "gated_norm", "gate", "short_conv", "add", "softcap", "head_linear", "write_latent",
    "head_squares"};

// How many experts there are, how many a row goes through, and which are here: `own` from `first` on; `shared`
// others, behind the `count` ones, all rows go through. If they lie in `groups`, some are chosen from the best `kept`.
struct ExpertSizes {
  int64_t count, used, first, own, shared, groups, kept;
  bool normalized;  // a row's shares sum to 1, before they are scaled
  bool sigmoid;     // probabilities are each score's own; else their softmax
  bool gated;       // shared ones' shares are sigmoids of scores behind the others; else 1
  float scale;

  int64_t places() const { return used + shared; }
  int64_t scores() const { return gated ? count + shared : count; }
};

// Buffers for a row in each of its places, sorted by expert: copies of the input, what the first matmul
// makes of it, this gated, and what the second makes of that.
struct ExpertBuffers {
  int gathered, hidden, gated, results;
};

// A layer's experts, and where the rows of the step under way go.
struct Experts {
  ExpertSizes sizes;
  ExpertBuffers buffers;
  std::vector<Weight> gate_up, down;  // one an expert, views of what is stacked
  const float *gate_up_bias, *down_bias;  // stacked alike, or null
  const float* preference;                // [count], added where experts are chosen, or null
  const float* factors;                   // [count], of their shares, or null
  std::vector<int32_t> chosen;            // [rows, places]
  std::vector<float> shares;              // [rows, places]
  std::vector<int64_t> places;            // [rows, places], rows of the buffers
  std::vector<int64_t> starts;        // [own + 1], each expert's first row there

  void sort(int64_t rows);
};

// A layer of delta nets: its weights, and the buffers of a step's channels and gates. A short
// convolution has taps, and channels for its inputs.
struct Delta {
  const float *taps, *decay, *offset;
  int channels, shares;
};

// One op; fields that it does not have keep their defaults. Values are numbers of buffers.
struct Instruction {
  Op op = Op::kEmbed;
  int in = -1, in2 = -1, in3 = -1, out = -1, out2 = -1;  // in2: residual, gate, or squares of heads; out2: the sum
  std::shared_ptr<Weight> weight;
  const float* vector = nullptr;   // norm weight, bias, norm of the queries, or the heads' sinks
  const float* vector2 = nullptr;  // norm of the keys
  const float* vector3 = nullptr;  // norm of the values
  const float *cosine = nullptr, *sine = nullptr;
  const float* growth = nullptr;  // factor of the queries at each position
  float* target = nullptr;  // where a linear writes that has no `out`: the logits
  float scalar = 0.0f;      // eps, a scale, or a cap
  float factor = 1.0f;      // of a sum
  int layer = 0, heads = 0, kv_heads = 0, activation = 0;
  int64_t window = 0;           // or the width of a norm, a latent, a head, or logits, or all ranks' key heads
  int64_t first = 0;            // token of an embedding table's first row, or column of what is gated or rotated
  std::vector<int64_t> widths;  // of the ranks' parts
  int reader = -1;              // the attention for which a linear fetches keys and values
  double soon_from = 0.0, soon_to = 0.0;  // which share of them
  int next_linear = -1;
  std::shared_ptr<Experts> experts;
  std::shared_ptr<Delta> delta;
  std::shared_ptr<std::vector<Weight>> parts;  // each head's
};

class Program {
 public:
  // Buffers hold up to `max_rows` rows. `exchange` is for the collectives; null if there are none.
  Program(std::shared_ptr<Pool> pool, const Kernels* kernels, int64_t max_rows,
          std::shared_ptr<Exchange> exchange);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // A buffer of `width` values a row, in the forms that its readers want; for `times` rows of each row.
  int add_buffer(int64_t width, bool floats, bool groups, bool whole, bool bf16, int64_t times = 1);
  // The paged cache of the next layer; memory stays with the caller.
  void add_cache(const LayerCache& cache);
  // The states of the next layer that keeps some; memory stays with the caller.
  void add_states(const LayerStates& states);
  void add(Instruction instruction);
  // `gate_up` and `down` stack what belongs to each expert that is here.
  void add_experts(int in, int scores, int out, const Weight& gate_up, const Weight& down,
                   const float* gate_up_bias, const float* down_bias, const float* preference,
                   const float* factors, ExpertSizes sizes, int activation, ExpertBuffers buffers);

  // `channels` and `shares` are buffers as wide as `in` and `gates`.
  void add_delta(int in, int gates, int out, int layer, const float* taps, const float* decay,
                 const float* offset, int channels, int shares);

  // `channels` is a buffer of a third of the width of `in`.
  void add_short_conv(int in, int out, int layer, const float* taps, int channels);

  // `weight` stacks what belongs to each head: of its part of `in` the first columns count.
  void add_head_linear(int in, int out, const Weight& weight, int heads);

  // Copies pages of all layers that share them, or their window pages.
  void copy_page(const PageCopy& copy);

  void run(const Batch& batch);

  // Among how many strands the last step was shared out; 0 if it was not. Not while profiling.
  int strands() const { return strands_; }
  // How many rows of logits the last step had.
  int64_t samples() const { return samples_; }

  // Nanoseconds spent in each kind of instruction since profiling began.
  void profile(bool on) {
    profiling_ = on;
    nanoseconds_.fill(0);
  }
  const std::array<int64_t, kOpNames.size()>& nanoseconds() const { return nanoseconds_; }

 private:
  struct Value {
    int64_t width;
    Buffer<float> floats;
    Buffer<uint16_t> bf16;
    Buffer<Activations::Group> groups;
    Buffer<int8_t> row_values;
    Buffer<float> row_scales;
    Buffer<int32_t> row_offsets;
    bool samples = false;  // rows are the sampled ones

    Activations activations() const;
    void copy_row(const Value& from, int64_t source, int64_t target) const;
  };

  struct PagesRead {
    bool windowed;
    int64_t window;
    std::vector<int32_t> pages;
  };
  struct alignas(64) Reading {
    std::vector<PagesRead> pages;
    std::vector<Soon::Piece> soon;
  };

  // The step's strands: a share of its sequences for each thread, whose rows it takes through the layers by
  // itself. None where that would not pay.
  std::vector<Batch> strands_of(const Batch& batch);
  void run_strands(const std::vector<Batch>& strands);
  // Finds out what strands run, and what it costs.
  void plan_strands();
  // Nanoseconds of a sequence's chunk, roughly.
  double cost_of(const Batch& batch, int64_t sequence) const;
  void step(const Instruction& i, const Batch& batch);
  void linear_step(const Instruction& i, const Batch& batch);
  // Shares what an attention reads of its cache out among the linears before it.
  void plan_reading(int attention);
  Reading& reading(const Batch& batch) { return readings_[static_cast<size_t>(batch.strand + 1)]; }
  // How a linear is shared out: its weight in so many pieces, for each of so many blocks of rows.
  struct Shares {
    int64_t blocks, pieces;
  };
  Shares shares_of(const Instruction& linear, const Batch& batch) const;
  // What a thread reads first of the linear that follows, if this piece is the last of its span.
  Soon::Piece first_tiles(const Instruction& linear, int64_t piece, int64_t pieces, const Batch& batch) const;
  // What a linear has to fetch of it.
  const std::vector<Soon::Piece>& read_soon(const Instruction& i, const Batch& batch);
  // What attentions of a kind read in the step under way; listed once a step.
  const std::vector<int32_t>& pages_read(const LayerCache& cache, int64_t window,
                                         const Batch& batch);
  void rope_step(const Instruction& i, const Batch& batch);
  void head_linear_step(const Instruction& i, const Batch& batch);
  void latent_step(const Instruction& i, const Batch& batch);
  void square_heads(const Instruction& i, const float* x, float* squares) const;
  // Of the logits, in place.
  void softcap_step(const Instruction& i, int64_t rows) const;
  void attention_step(const Instruction& i, const Batch& batch);
  void collective_step(const Instruction& i, int64_t rows, const Batch& batch);
  void delta_step(const Instruction& i, const Batch& batch);
  void prepare_delta(const Instruction& i, const Batch& batch, int64_t sequence, int64_t row);
  void delta_head(const Instruction& i, const Batch& batch, int64_t sequence, int64_t head);
  void short_conv_step(const Instruction& i, const Batch& batch);
  // Convolves a row of `from`, behind a sequence's state.
  void convolve(const Instruction& i, const Batch& batch, int64_t sequence, int64_t row,
                const Value& from, bool activated, float* out) const;
  void keep_inputs(const LayerStates& states, const Value& from, const Batch& batch,
                   int64_t sequence) const;
  // Which chunk each row belongs to.
  static const std::vector<int64_t>& sequences_of(const Batch& batch);
  void experts_step(const Instruction& i, int64_t rows);
  void multiply_experts(const Experts& e, const std::vector<Weight>& weights, const float* bias,
                        const Value& value, float* y);
  // Makes the other forms that readers want of the floats of `value`.
  void make_forms(const Value& value, int64_t rows, const Batch& batch) const;
  // Finishes a row that was computed into `row_values`: stores it in every form of `value`.
  void store_row(const Value& value, int64_t row, const float* row_values) const;
  int64_t rows_of(int value, const Batch& batch) const;
  // How many threads share the batch: one a strand, though others may help.
  int64_t threads_of(const Batch& batch) const {
    return batch.strand == Pool::kNoStrand ? pool_->threads() : 1;
  }
  // Calls body(first, last) for pieces of [begin, end), `grain` at a time, in the batch's strand if it is one.
  template <typename Body>
  void share_out(const Batch& batch, int64_t begin, int64_t end, int64_t grain, const Body& body) const {
    pool_->run(end - begin, grain,
               [&](int64_t first, int64_t last) { body(begin + first, begin + last); }, batch.strand);
  }

  std::shared_ptr<Pool> pool_;
  const Kernels& kernels_;
  int64_t max_rows_;
  std::shared_ptr<Exchange> exchange_;
  std::vector<Value> values_;
  std::vector<LayerCache> caches_;
  std::vector<LayerStates> states_;
  std::vector<Instruction> instructions_;
  // The first instructions, whose rows need nothing of other rows but from the cache, or 0; what a row costs
  // there, and a token that attentions of a kind read.
  size_t strand_end_ = 0;
  int strands_ = 0;
  int64_t samples_ = 0;
  double row_cost_ = 0.0;  // 0 until it is known
  struct ReadCost {
    int64_t window, rows;  // every so many rows of a chunk read it again
    double cost;
  };
  std::vector<ReadCost> read_costs_;
  std::vector<int> linears_;  // since the last attention
  int last_linear_ = -1;
  std::vector<Reading> readings_;  // of all threads, then of each strand
  bool profiling_ = false;
  std::array<int64_t, kOpNames.size()> nanoseconds_{};
};

}  // namespace ryzanstein
