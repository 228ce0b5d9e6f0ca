// A thread pool for one step at a time: the caller works too, workers spin briefly, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace ryzanstein {

class Pool {
 public:
  // Throws std::system_error if the threads cannot be had. `jobs` is what the count of jobs begins
  // with, for tests of its wrapping.
  explicit Pool(int threads, uint64_t jobs = 0);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  static constexpr int kNoStrand = -1;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // While one of these lives the workers stay awake, so that `run` costs well under a microsecond.
  class Awake {
   public:
    explicit Awake(Pool& pool) : pool_(pool) { pool_.begin(); }
    ~Awake() { pool_.end(); }
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    Pool& pool_;
  };

  // Calls body(first, last) for pieces of [0, count), `grain` at a time, and returns when all are
  // done. Every thread has a span of its own, so that it reads memory in order and finds what it
  // wrote; done with that, it takes pieces of the others' spans. Only pieces are waited for, never
  // threads: one that the system has put aside delays at most the piece that it holds.
  // A body may not throw.
  //
  // A piece may itself be a strand: a long piece of work that runs jobs of its own, under a number from
  // [0, threads()) that no other has. Its thread does them alone, as long as all are busy; whoever has
  // nothing else to do takes pieces of strands. If its thread is put aside, the strand waits with it.
  template <typename Body>
  void run(int64_t count, int64_t grain, const Body& body, int strand = kNoStrand) {
    if (count <= grain || workers_.empty()) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    dispatch(
        [](const void* raw, int64_t first, int64_t last) noexcept {
          (*static_cast<const Body*>(raw))(first, last);
        },
        &body, count, grain, boards_[static_cast<size_t>(strand + 1)]);
  }

 private:
  using Call = void (*)(const void*, int64_t, int64_t) noexcept;

  // Number of the job in the upper half, the span's next piece in the lower; 0 while none is open.
  struct alignas(64) Ticket {
    std::atomic<uint64_t> next{0};
  };

  // Where a job is put up: one board for those of all threads, with a span for each, and one for each
  // strand. A thread reads what the job is between loading a ticket and claiming from it; if the claim
  // succeeds the ticket has not changed, so what was read belongs to it.
  struct Board {
    std::vector<Ticket> spans;
    std::atomic<Call> call{nullptr};
    std::atomic<const void*> body{nullptr};
    std::atomic<int64_t> count{0}, grain{1};
    uint64_t jobs = 0;
    alignas(64) std::atomic<int64_t> done{0};

    // The first piece of a span; that of `spans.size()` is the number of pieces.
    int64_t first(int64_t pieces, size_t span) const {
      return pieces * static_cast<int64_t>(span) / static_cast<int64_t>(spans.size());
    }
    // Runs the next piece, of span `own` first; false if none is left.
    bool claim_and_run(size_t own);
    bool claim_from(size_t span);
  };

  void begin();
  void end();
  void stop();
  void dispatch(Call call, const void* body, int64_t count, int64_t grain, Board& board);
  // Runs a piece of any strand.
  bool help();
  // A system may put two of the threads on one core while another is free, for a tick or two: so a worker
  // that finds itself where another thread is goes elsewhere, once a step, and the caller lets those run
  // that have not come. Where it may run does not change, but for the moment of going.
  void settle(size_t thread);
  // Which of the threads calls this; whoever is no worker is the first.
  size_t caller() const;
  void leave_core(size_t thread) const;
  bool all_came() const;
  void work(size_t thread);

  std::vector<std::thread> workers_;
  std::vector<Board> boards_;
  // The core that each thread was last seen on; none while it sleeps.
  struct alignas(64) Place {
    std::atomic<int> core{kAsleep};
    uint32_t moved = 0;  // the step in which it last went elsewhere
  };
  static constexpr int kAsleep = -1;
  std::vector<Place> places_;
  int looks_ = 0;  // how often the caller has looked for others in this step
  alignas(64) std::atomic<uint32_t> awake_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace ryzanstein
