// Steps one behind another on a thread of their own, which needs nothing of whoever submits them: a step takes the
// tokens that the one before it drew, and begins as soon as that has ended.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "choosing.h"
#include "program.h"

namespace ryzanstein {

// What lasts from step to step, by slot. Memory stays with the caller.
struct Tables {
  const int32_t* pages;
  const int32_t* windows;  // null where all layers share their pages
  int64_t width, page_size;
  const uint64_t* seeds;
  int64_t* last_ids;  // the token last drawn at each slot
};

// Inputs as in kernels/batch.py. The tokens of the first `fed` rows are those last drawn at their slots; what the
// logits rows `drawn` draw stays at `slots`. All logits rows draw.
struct StepInputs {
  std::vector<int64_t> token_ids, positions, kv_slots, window_slots, sample_rows;
  std::vector<int32_t> query_starts, context_lengths, table_rows, kept_rows, kept_at;
  int64_t fed;
  std::vector<float> temperature, top_p, min_p;
  std::vector<int32_t> top_k;
  std::vector<double> uniform;
  std::vector<int64_t> drawn, slots;
  std::vector<PageCopy> copies;  // made before anything is computed

  // Throws std::invalid_argument if the sizes do not fit.
  void check() const;
  // The next step, of the same sequences: for one that only decodes.
  StepInputs following(const Tables& tables) const;
};

// A step, and once it is `done` what it gave.
struct Step {
  const StepInputs inputs;
  std::vector<int64_t> token_ids;  // those of the inputs, with what was drawn at the slots of the first
  std::vector<int64_t> ids;
  double move = 0.0, forward = 0.0, sample = 0.0;  // seconds
  std::exception_ptr error;
  std::atomic<bool> done{false};

  explicit Step(StepInputs given) : inputs(std::move(given)), token_ids(inputs.token_ids) {}
};

class StepQueue {
 public:
  // Throws std::system_error if the thread cannot be had.
  StepQueue(std::shared_ptr<Pool> pool, const Kernels* kernels, const Tables& tables);
  ~StepQueue();
  StepQueue(const StepQueue&) = delete;
  StepQueue& operator=(const StepQueue&) = delete;

  const Tables& tables() const { return tables_; }
  // Has the step run on `program`, whose logits, of `vocab` tokens each, lie at `logits`, once those before it have
  // ended; then `told`, a file descriptor, gets a byte. All of them must last until it is done.
  void submit(Step& step, Program& program, const float* logits, int64_t vocab, int told);
  // Waits until all steps have ended.
  void drain();
  // Ends the thread once all steps have; false, and the thread is left behind with all that it uses, if that
  // takes longer.
  bool close(double seconds);

 private:
  struct Task {
    Step* step;
    Program* program;
    const float* logits;
    int64_t vocab;
    int told;
  };
  // What the thread has; it outlives a queue that leaves it behind.
  struct Line {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Task> tasks;
    bool running = false, ends = false, ended = false;
  };

  static void work(Line& line, Pool& pool, const Kernels& kernels, const Tables& tables);

  Tables tables_;
  std::shared_ptr<Line> line_;
  std::thread thread_;
  bool left_ = false;
};

}  // namespace ryzanstein
