// A thread pool for one step at a time: the caller works too, workers spin briefly, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace ryzanstein {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Between `begin` and `end` the workers stay awake, so that `run` costs well under a microsecond.
  void begin();
  void end();

  // Calls body(first, last) for pieces of [0, count), `grain` at a time, taken from one atomic
  // counter by whoever is free: a preempted thread delays only the piece that it holds.
  template <typename Body>
  void run(int64_t count, int64_t grain, const Body& body) {
    if (count <= grain || workers_.empty()) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    struct Context {
      const Body* body;
      int64_t count, grain;
      std::atomic<int64_t>* next;
    } context{&body, count, grain, &next_};
    dispatch(
        [](void* raw) {
          auto* c = static_cast<Context*>(raw);
          for (;;) {
            int64_t first = c->next->fetch_add(c->grain, std::memory_order_relaxed);
            if (first >= c->count) return;
            int64_t last = first + c->grain < c->count ? first + c->grain : c->count;
            (*c->body)(first, last);
          }
        },
        &context);
  }

 private:
  using Task = void (*)(void*);
  void dispatch(Task task, void* context);
  void work();

  std::vector<std::thread> workers_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<uint32_t> awake_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace ryzanstein
