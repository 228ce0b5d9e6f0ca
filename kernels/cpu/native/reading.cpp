// Keys and values are fetched while linears compute. An attention of decodes is bound by memory, which idles
// while a linear of several rows is bound by its products: so the linears before an attention fetch what it
// is going to read.
#include <algorithm>
#include <utility>

#include "program.h"

namespace ryzanstein {
namespace {

// What is fetched for an attention, at most, for each thread: it has to stay in caches until then. Where it is
// more, nothing is.
constexpr int64_t kSoonBytes = int64_t{3} << 20;
// A linear of fewer rows is bound by memory itself.
constexpr int64_t kSoonRows = 5;

}  // namespace

void Program::plan_reading(int attention) {
  int64_t work = 0, before = 0;
  for (int n : linears_) work += static_cast<int64_t>(instructions_[n].weight->bytes);
  for (int n : linears_) {
    Instruction& linear = instructions_[n];
    linear.reader = attention;
    linear.soon_from = static_cast<double>(before) / static_cast<double>(work);
    before += static_cast<int64_t>(linear.weight->bytes);
    linear.soon_to = static_cast<double>(before) / static_cast<double>(work);
  }
  linears_.clear();
}

const std::vector<Soon::Piece>& Program::read_soon(const Instruction& i, const Batch& batch) {
  std::vector<Soon::Piece>& soon = reading(batch).soon;
  soon.clear();
  if (i.reader < 0 || batch.tokens - batch.first_token < kSoonRows) return soon;
  const Instruction& reader = instructions_[static_cast<size_t>(i.reader)];
  const LayerCache& cache = caches_[static_cast<size_t>(reader.layer)];
  const std::vector<int32_t>& pages = pages_read(cache, reader.window, batch);
  const int64_t tokens = cache.heads * cache.page_size;
  const int64_t bytes = tokens * cache.vector_bytes(), scales = tokens * cache.scale_bytes();
  const int64_t all = static_cast<int64_t>(pages.size()) * 2 * (bytes + scales);
  if (all > kSoonBytes * threads_of(batch)) return soon;
  const auto cut = [&](double share) {
    return static_cast<size_t>(share * static_cast<double>(pages.size()));
  };
  const auto add = [&](const void* memory, int64_t page, int64_t length) {
    const auto* first = static_cast<const uint8_t*>(memory) + page * length;
    soon.push_back({first, first + length});
  };
  for (size_t n = cut(i.soon_from); n < cut(i.soon_to); ++n) {
    add(cache.keys, pages[n], bytes);
    add(cache.values, pages[n], bytes);
    if (scales == 0) continue;
    add(cache.key_scales, pages[n], scales);
    add(cache.value_scales, pages[n], scales);
  }
  return soon;
}

const std::vector<int32_t>& Program::pages_read(const LayerCache& cache, int64_t window,
                                                const Batch& batch) {
  std::vector<PagesRead>& listed = reading(batch).pages;
  for (const PagesRead& read : listed) {
    if (read.windowed == cache.windowed && read.window == window) return read.pages;
  }
  std::vector<int32_t> found;
  const int32_t* table = cache.windowed ? batch.window_table : batch.page_table;
  const int64_t size = cache.page_size;
  const int32_t* before = nullptr;
  int64_t known = 0;
  for (int64_t s = batch.first_sequence; s < batch.sequences; ++s) {
    const int32_t* pages = table + batch.table_rows[s] * batch.table_width;
    const int64_t end = batch.positions[batch.query_starts[s + 1] - 1] + 1;
    const int64_t begin = window ? std::max<int64_t>(0, end - window) : 0;
    for (int64_t p = begin / size; p * size < end; ++p) {
      // Whoever has a beginning in common with the one before.
      if (p < known && before[p] == pages[p]) continue;
      found.push_back(pages[p]);
    }
    before = pages, known = (end + size - 1) / size;
  }
  listed.push_back({cache.windowed, window, std::move(found)});
  return listed.back().pages;
}

}  // namespace ryzanstein
