// Tokens of logits rows, rows shared among a pool's threads.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace ryzanstein {

// What is changed about a row's logits before a token is chosen: (row, ids' address, addends' address, their
// number, counts' and seen's address or 0, repetition, presence, frequency, mask's address or 0). A mask has a
// bit for each token that is allowed.
using Edit = std::tuple<int64_t, uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, float, float, float, uintptr_t>;

// By row of the logits, but for `rows`: those that choose.
struct Choice {
  const int64_t* rows;
  int64_t count;
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p;
  const double* uniform;
};

// ids[i] = the token of logits row rows[i]: a draw where temperature[row] > 0, else the likeliest.
void choose(Pool& pool, const Kernels& kernels, const float* logits, int64_t vocab, const Choice& choice,
            const std::vector<Edit>& edits, int64_t* ids);

}  // namespace ryzanstein
