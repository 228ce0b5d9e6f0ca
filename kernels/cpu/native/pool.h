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
  template <typename Body>
  void run(int64_t count, int64_t grain, const Body& body) {
    if (count <= grain || workers_.empty()) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    dispatch(
        [](const void* raw, int64_t first, int64_t last) noexcept {
          (*static_cast<const Body*>(raw))(first, last);
        },
        &body, count, grain);
  }

 private:
  using Call = void (*)(const void*, int64_t, int64_t) noexcept;

  // Number of the job in the upper half, the span's next piece in the lower; 0 while none is open.
  struct alignas(64) Ticket {
    std::atomic<uint64_t> next{0};
  };

  void begin();
  void end();
  void stop();
  void dispatch(Call call, const void* body, int64_t count, int64_t grain);
  // The first piece of a span; that of `threads()` is the number of pieces.
  int64_t span(int64_t pieces, int thread) const { return pieces * thread / threads(); }
  bool claim_and_run(int thread);
  bool claim_from(int span_of);
  void work(int thread);

  std::vector<std::thread> workers_;
  std::vector<Ticket> tickets_;
  // The job under way. A worker reads these between loading a ticket and claiming from it; if the
  // claim succeeds the ticket has not changed, so what was read belongs to it.
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<int64_t> count_{0}, grain_{1};
  uint64_t jobs_;
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> awake_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace ryzanstein
