// Collectives of processes on one machine, over memory that all of them map: every rank writes its
// part, says so, waits for the others, and reads theirs. Sums run in the order of the ranks, so that
// all ranks get the same bits, every time.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace ryzanstein {

class Exchange {
 public:
  // Maps the memory behind `fd`, of at least `bytes(ranks, slot)` zeroed bytes. A rank passes on up
  // to `slot` bytes at a time. Throws std::invalid_argument or std::system_error.
  Exchange(int fd, int rank, int ranks, int64_t slot);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  static int64_t bytes(int ranks, int64_t slot);

  // out[row] = the ranks' rows side by side, widths[r] floats of rank r. All ranks call it with the
  // same `rows` and `widths`. Throws std::runtime_error if a rank has given up.
  void gather(Pool& pool, const float* in, int64_t rows, const std::vector<int64_t>& widths,
              float* out);
  // out = the sum of the ranks' `rows` x `width` floats, first rank first.
  void sum(Pool& pool, const float* in, int64_t rows, int64_t width, float* out);

  // Makes every rank's collectives throw, now and from now on.
  void abort() { head_->aborted.store(1, std::memory_order_release); }

 private:
  struct alignas(64) Place {
    std::atomic<uint64_t> turn;
  };
  struct Head {
    alignas(64) std::atomic<uint32_t> aborted;
    Place arrived[63];
  };
  static_assert(sizeof(Head) == 4096);

  // What rank `rank` passes on in the turn that comes next; turns alternate between two places, so
  // that nobody overwrites what another may still read.
  float* slot(int rank) const;
  int64_t rows_at_once(int64_t width) const;
  void meet();

  Head* head_ = nullptr;
  uint8_t* data_ = nullptr;
  int rank_, ranks_;
  int64_t slot_, size_;
  uint64_t turn_ = 0;
};

}  // namespace ryzanstein
