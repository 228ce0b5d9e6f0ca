#include "choosing.h"

#include <algorithm>

namespace ryzanstein {
namespace {

template <typename T>
const T* at(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

void apply(const Kernels& kernels, const Edit& edit, const float* logits, int64_t vocab, float* x) {
  const auto& [row, tokens, addends, count, counts, seen, repetition, presence, frequency, mask] = edit;
  if (count == 0 && counts == 0 && mask != 0) return kernels.forbid(at<uint32_t>(mask), logits, vocab, x);
  std::copy_n(logits, vocab, x);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = at<int64_t>(tokens)[i];
    // An end of sequence that the model has no logit for needs no forbidding.
    if (token >= 0 && token < vocab) x[token] += at<float>(addends)[i];
  }
  if (counts != 0) {
    kernels.penalize(x, vocab, {at<int32_t>(counts), at<bool>(seen), repetition, presence, frequency});
  }
  if (mask != 0) kernels.forbid(at<uint32_t>(mask), x, vocab, x);
}

}  // namespace

void choose(Pool& pool, const Kernels& kernels, const float* logits, int64_t vocab, const Choice& choice,
            const std::vector<Edit>& edits, int64_t* ids) {
  const auto choose_rows = [&](int64_t first, int64_t last) {
    static thread_local std::vector<uint8_t> scratch;
    static thread_local std::vector<float> edited;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = choice.rows[i];
      const float* x = logits + row * vocab;
      const auto edit =
          std::find_if(edits.begin(), edits.end(), [&](const Edit& e) { return std::get<0>(e) == row; });
      if (edit != edits.end()) {
        edited.resize(static_cast<size_t>(vocab));
        apply(kernels, *edit, x, vocab, edited.data());
        x = edited.data();
      }
      const Filters filters{choice.temperature[row], choice.top_k[row], choice.top_p[row], choice.min_p[row],
                            choice.uniform[row]};
      if (filters.temperature <= 0.0f) {
        ids[i] = kernels.argmax(x, vocab);
        continue;
      }
      scratch.resize(std::max<size_t>(scratch.size(), static_cast<size_t>(vocab * kDrawBytes)));
      ids[i] = kernels.draw(x, vocab, filters, scratch.data());
    }
  };
  // One row is not worth waking anybody.
  if (choice.count <= 1) return choose_rows(0, choice.count);
  const Pool::Awake awake(pool);
  pool.run(choice.count, 1, choose_rows);
}

}  // namespace ryzanstein
