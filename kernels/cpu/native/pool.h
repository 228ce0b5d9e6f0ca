// A thread pool for one step at a time: the caller works too, workers spin briefly, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace ryzanstein {

class Pool {
 public:
  // Throws std::system_error if the threads cannot be had.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  static constexpr int kNoStrand = -1;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // The first piece of a thread's span; that of thread `threads` is the number of pieces.
  static int64_t first_of(int64_t pieces, int64_t thread, int64_t threads) { return pieces * thread / threads; }
  // The thread whose span a piece is in.
  static int64_t thread_of(int64_t pieces, int64_t piece, int64_t threads) {
    return ((piece + 1) * threads - 1) / pieces;
  }

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

  // A job, as one thread's span of it: all in one line, so that it comes to another core at once. `next` holds
  // the number of the job (32 bits), the span's end and its next piece (16 each). A thread reads what the job is
  // between loading `next` and claiming from it; if the claim succeeds `next` has not changed, so what was read
  // belongs to it. A job is put up only when all pieces of the last one have been claimed, so nobody claims
  // from what is half written.
  struct alignas(64) Span {
    std::atomic<uint64_t> next{0};
    std::atomic<Call> call{nullptr};
    std::atomic<const void*> body{nullptr};
    std::atomic<int64_t> count{0}, grain{1};
  };
  static constexpr int64_t kMostPieces = 0xffff;

  // Pieces that have been run since the board was made.
  struct alignas(64) Tally {
    std::atomic<uint64_t> pieces{0};
  };

  // Where a job is put up: one board for those of all threads, with a span for each, and one for each strand.
  struct Board {
    std::vector<Span> spans;
    std::vector<Tally> run;  // a thread's own, but for a strand, whose thread is mostly alone
    uint32_t jobs = 0;
    uint64_t put_up = 0;  // pieces of all jobs

    // Runs the next piece, of the thread's own span first; false if none is left.
    bool claim_and_run(size_t thread);
    bool claim_from(size_t span, size_t thread);
    void ran(size_t thread);
    bool all_ran() const;
  };

  void begin();
  void end();
  void stop();
  void dispatch(Call call, const void* body, int64_t count, int64_t grain, Board& board);
  // Runs a piece of any strand.
  bool help(size_t thread);
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
