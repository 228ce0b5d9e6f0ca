// Steps of many sequences are shared out by sequences: each thread takes its rows through all layers by itself.
// Then no thread waits for another between ops, and no row goes from one core's cache to the other's, which
// takes three times as long where cores share no cache. Who is done first helps the others.
#include <algorithm>
#include <exception>

#include "program.h"

namespace ryzanstein {
namespace {

// What sequences are weighed with: a thread's products of weights and its bytes of keys and values, a
// nanosecond. Roughly, since whoever is done first helps.
constexpr double kProducts = 150.0, kReads = 20.0;

// How much more than its share the largest strand may be.
constexpr double kLargest = 1.4;

// Rows a thread from which strands pay, measured with two threads: each reads all weights, which costs more the
// more of them there are.
constexpr int64_t strand_rows(int64_t threads) { return threads > 2 ? 24 : 6; }

bool rows_alone(Op op) {
  switch (op) {
    case Op::kEmbed:
    case Op::kRmsNorm:
    case Op::kAdd:
    case Op::kAddRmsNorm:
    case Op::kLinear:
    case Op::kHeadSquares:
    case Op::kRopeWriteKv:
    case Op::kHeadLinear:
    case Op::kWriteLatent:
    case Op::kAttention:
    case Op::kGated:
    case Op::kGate: return true;
    default: return false;
  }
}

}  // namespace

void Program::plan_strands() {
  strand_end_ = 0;
  read_costs_.clear();
  while (strand_end_ < instructions_.size() && rows_alone(instructions_[strand_end_].op)) ++strand_end_;
  // The rows that are asked for go on from there by themselves, shared out by outputs.
  const bool whole = strand_end_ < instructions_.size() && instructions_[strand_end_].op == Op::kSelectRows;
  if (!whole) strand_end_ = 0;
  row_cost_ = 1.0;
  for (size_t n = 0; n < strand_end_; ++n) {
    const Instruction& i = instructions_[n];
    if (i.op == Op::kLinear) row_cost_ += static_cast<double>(i.weight->rows * i.weight->columns) / kProducts;
    if (i.op == Op::kHeadLinear) {
      const Weight& part = i.parts->front();
      row_cost_ += static_cast<double>(i.heads * part.rows * part.columns) / kProducts;
    }
    if (i.op != Op::kAttention) continue;
    const LayerCache& cache = caches_[static_cast<size_t>(i.layer)];
    const int64_t bytes = 2 * cache.heads * (cache.vector_bytes() + cache.scale_bytes());
    const int64_t rows = tokens_a_task(i.heads / cache.heads);
    const auto same = [&](const ReadCost& read) { return read.window == i.window && read.rows == rows; };
    auto found = std::find_if(read_costs_.begin(), read_costs_.end(), same);
    if (found == read_costs_.end()) found = read_costs_.insert(found, {i.window, rows, 0.0});
    found->cost += static_cast<double>(bytes) / kReads;
  }
}

double Program::cost_of(const Batch& batch, int64_t sequence) const {
  const int64_t context = batch.context_lengths[sequence];
  const int64_t rows = batch.query_starts[sequence + 1] - batch.query_starts[sequence];
  double cost = row_cost_ * static_cast<double>(rows);
  for (const ReadCost& read : read_costs_) {
    const int64_t tokens = read.window ? std::min(read.window, context) : context;
    cost += read.cost * static_cast<double>(tokens * ((rows + read.rows - 1) / read.rows));
  }
  return cost;
}

std::vector<Batch> Program::strands_of(const Batch& batch) {
  const int64_t threads = pool_->threads();
  if (row_cost_ == 0.0) plan_strands();
  if (threads == 1 || strand_end_ == 0 || profiling_) return {};
  if (batch.tokens < strand_rows(threads) * threads || batch.sequences < threads) return {};
  double all = 0.0;
  for (int64_t s = 0; s < batch.sequences; ++s) all += cost_of(batch, s);
  const double share = all / static_cast<double>(threads);
  std::vector<Batch> strands(static_cast<size_t>(threads), batch);
  double sum = 0.0, begun = 0.0;
  int64_t s = 0;
  for (int strand = 0; strand < threads; ++strand) {
    Batch& mine = strands[static_cast<size_t>(strand)];
    mine.strand = strand;
    mine.first_sequence = s;
    mine.first_token = batch.query_starts[s];
    const bool last = strand + 1 == threads;
    for (; s < batch.sequences; ++s) {
      const double cost = cost_of(batch, s);
      // Chunks of one sequence read what those before them write.
      const bool begins = s == 0 || batch.table_rows[s] != batch.table_rows[s - 1];
      if (!last && begins && sum + cost / 2 > share * (strand + 1)) break;
      sum += cost;
    }
    if (s == mine.first_sequence || sum - begun > kLargest * share) return {};
    begun = sum;
    mine.sequences = s;
    mine.tokens = batch.query_starts[s];
  }
  return strands;
}

void Program::run_strands(const std::vector<Batch>& strands) {
  std::vector<std::exception_ptr> failed(strands.size());
  pool_->run(static_cast<int64_t>(strands.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const size_t strand = static_cast<size_t>(n);
      try {
        for (size_t k = 0; k < strand_end_; ++k) step(instructions_[k], strands[strand]);
      } catch (...) {
        failed[strand] = std::current_exception();
      }
    }
  });
  for (const std::exception_ptr& error : failed) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace ryzanstein
