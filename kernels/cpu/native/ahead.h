// What a matmul fetches while it computes.
#pragma once

#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {

// Lines of `Soon` that a step fetches at most: some 7 GB/s a thread, which leaves the weights their share.
constexpr int64_t kSoonLines = 4;

// What is fetched while passes compute, some lines a step: the tiles that come after, for memory would idle
// otherwise, since all rows but a pass's first find the weights in the cache; then what other ops read soon.
// Into the second level, since the first is full of these tiles and of activations.
class Ahead {
 public:
  Ahead() = default;
  // For so many steps in all.
  Ahead(const Soon& soon, int64_t steps) : piece_(soon.pieces), pieces_end_(soon.pieces + soon.count) {
    int64_t bytes = 0;
    for (const Soon::Piece* piece = piece_; piece != pieces_end_; ++piece) bytes += piece->end - piece->begin;
    soon_lines_ = bytes ? least((bytes / 64 + steps - 1) / steps, kSoonLines) : 0;
  }

  // Another pass, and its share of the tiles that come after.
  void begin(const uint8_t* first, const uint8_t* last, int64_t lines) {
    if (end_ != own_end_) {
      rest_ = {at_, end_};
    } else if (!at_) {  // nothing was left
      rest_ = {nullptr, nullptr};
    }
    at_ = first;
    end_ = own_end_ = last;
    lines_ = lines + soon_lines_;
  }

  // The last of a run may go a few lines beyond it.
  void step() {
    if (__builtin_expect(at_ >= end_, 0)) turn();
    for (int64_t i = 0; i < lines_; ++i, at_ += 64) _mm_prefetch(at_, _MM_HINT_T1);
  }

 private:
  void turn() {
    if (end_ == own_end_) {
      at_ = rest_.begin;
      end_ = rest_.end;
    }
    for (; at_ >= end_; ++piece_) {
      if (piece_ == pieces_end_) {  // no more in this pass
        at_ = nullptr;
        end_ = own_end_;
        lines_ = 0;
        return;
      }
      at_ = piece_->begin;
      end_ = piece_->end;
    }
  }

  const uint8_t *at_ = nullptr, *end_ = nullptr;
  int64_t lines_ = 0, soon_lines_ = 0;
  const uint8_t* own_end_ = nullptr;    // of the tiles; another end is that of a piece
  Soon::Piece rest_{nullptr, nullptr};  // of a piece that an earlier pass began
  const Soon::Piece *piece_ = nullptr, *pieces_end_ = nullptr;
};

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
