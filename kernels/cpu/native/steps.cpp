#include "steps.h"

#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>

namespace ryzanstein {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point start, Clock::time_point end) {
  return std::chrono::duration<double>(end - start).count();
}

template <typename T>
const T* data_or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

// As `counter_uniform` in kernels/batch.py: two rounds of SplitMix64's finalizer (Steele et al., OOPSLA 2014).
double counter_uniform(uint64_t seed, int64_t position) {
  uint64_t x = seed + (static_cast<uint64_t>(position) + 1) * 0x9E3779B97F4A7C15u;
  for (int round = 0; round < 2; ++round) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
  }
  return static_cast<double>(x >> 11) * 0x1.0p-53;
}

void run_step(Step& step, Program& program, const float* logits, int64_t vocab, Pool& pool, const Kernels& kernels,
              const Tables& tables) {
  const StepInputs& in = step.inputs;
  const auto begin = Clock::now();
  for (const PageCopy& copy : in.copies) program.copy_page(copy);
  const auto start = Clock::now();
  step.move = in.copies.empty() ? 0.0 : seconds_between(begin, start);
  for (int64_t row = 0; row < in.fed; ++row) step.token_ids[row] = tables.last_ids[in.table_rows[row]];
  const int64_t rows = static_cast<int64_t>(in.sample_rows.size());
  program.run({step.token_ids.data(), in.positions.data(), in.kv_slots.data(), in.query_starts.data(),
               in.context_lengths.data(), in.table_rows.data(), tables.pages, in.sample_rows.data(),
               static_cast<int64_t>(in.token_ids.size()), static_cast<int64_t>(in.table_rows.size()), rows, tables.width,
               data_or_null(in.kept_rows), data_or_null(in.kept_at), data_or_null(in.window_slots), tables.windows});
  const auto middle = Clock::now();
  std::vector<int64_t> every(in.sample_rows.size());
  for (int64_t row = 0; row < rows; ++row) every[row] = row;
  step.ids.resize(every.size());
  const Choice choice{every.data(),    rows,           in.temperature.data(), in.top_k.data(), in.top_p.data(),
                      in.min_p.data(), in.uniform.data()};
  choose(pool, kernels, logits, vocab, choice, {}, step.ids.data());
  for (size_t n = 0; n < in.drawn.size(); ++n) tables.last_ids[in.slots[n]] = step.ids[in.drawn[n]];
  step.forward = seconds_between(start, middle);
  step.sample = seconds_between(middle, Clock::now());
}

}  // namespace

void StepInputs::check() const {
  const size_t rows = token_ids.size(), chunks = table_rows.size(), logits = sample_rows.size();
  const auto either = [](size_t size, size_t wanted) { return size == 0 || size == wanted; };
  const bool fits = positions.size() == rows && kv_slots.size() == rows && either(window_slots.size(), rows) &&
                    query_starts.size() == chunks + 1 && context_lengths.size() == chunks &&
                    either(kept_rows.size(), chunks) && either(kept_at.size(), chunks) &&
                    temperature.size() == logits && top_p.size() == logits && min_p.size() == logits &&
                    top_k.size() == logits && uniform.size() == logits && drawn.size() == slots.size() &&
                    fed >= 0 && static_cast<size_t>(fed) <= chunks && static_cast<size_t>(fed) <= rows;
  if (!fits) throw std::invalid_argument("a step's arrays do not belong together");
  for (const int64_t row : drawn) {
    if (row < 0 || static_cast<size_t>(row) >= logits) throw std::invalid_argument("no such logits row");
  }
}

StepInputs StepInputs::following(const Tables& tables) const {
  if (token_ids.size() != table_rows.size() || sample_rows.size() != table_rows.size()) {
    throw std::invalid_argument("only a step that decodes is followed by its like");
  }
  StepInputs next = *this;
  next.copies.clear();
  for (size_t row = 0; row < table_rows.size(); ++row) {
    const int64_t position = ++next.positions[row];
    ++next.context_lengths[row];
    const int64_t place = table_rows[row] * tables.width + position / tables.page_size;
    const int64_t offset = position % tables.page_size;
    next.kv_slots[row] = tables.pages[place] * tables.page_size + offset;
    if (tables.windows != nullptr) next.window_slots[row] = tables.windows[place] * tables.page_size + offset;
    if (temperature[row] > 0.0f) next.uniform[row] = counter_uniform(tables.seeds[table_rows[row]], position + 1);
  }
  return next;
}

StepQueue::StepQueue(std::shared_ptr<Pool> pool, const Kernels* kernels, const Tables& tables)
    : tables_(tables), line_(std::make_shared<Line>()) {
  thread_ = std::thread([line = line_, pool = std::move(pool), kernels, tables] { work(*line, *pool, *kernels, tables); });
  pthread_setname_np(thread_.native_handle(), "ryzanstein-step");
}

StepQueue::~StepQueue() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard<std::mutex> lock(line_->mutex);
    line_->ends = true;
  }
  line_->changed.notify_all();
  thread_.join();
}

void StepQueue::submit(Step& step, Program& program, const float* logits, int64_t vocab, int told) {
  step.done.store(false, std::memory_order_relaxed);
  {
    const std::lock_guard<std::mutex> lock(line_->mutex);
    if (line_->ends) throw std::runtime_error("the queue of steps is closed");
    line_->tasks.push_back({&step, &program, logits, vocab, told});
  }
  line_->changed.notify_all();
}

void StepQueue::drain() {
  std::unique_lock<std::mutex> lock(line_->mutex);
  line_->changed.wait(lock, [&] { return line_->tasks.empty() && !line_->running; });
}

bool StepQueue::close(double seconds) {
  if (!thread_.joinable()) return !left_;
  {
    std::unique_lock<std::mutex> lock(line_->mutex);
    line_->ends = true;
    line_->changed.notify_all();
    const auto patience = std::chrono::duration<double>(seconds);
    if (!line_->changed.wait_for(lock, patience, [&] { return line_->ended; })) {
      thread_.detach();
      left_ = true;
      return false;
    }
  }
  thread_.join();
  return true;
}

void StepQueue::work(Line& line, Pool& pool, const Kernels& kernels, const Tables& tables) {
  std::unique_lock<std::mutex> lock(line.mutex);
  for (;;) {
    line.changed.wait(lock, [&] { return !line.tasks.empty() || line.ends; });
    if (line.tasks.empty()) break;
    const Task task = std::move(line.tasks.front());
    line.tasks.pop_front();
    line.running = true;
    lock.unlock();
    try {
      run_step(*task.step, *task.program, task.logits, task.vocab, pool, kernels, tables);
    } catch (...) {
      task.step->error = std::current_exception();
    }
    const int told = task.told;
    // In this order: who is told may take this core at once, and must not ask in vain until it is given back. The
    // step may be gone from here on. Where nobody reads any more there is no one to tell.
    task.step->done.store(true, std::memory_order_release);
    const char byte = 0;
    [[maybe_unused]] const ssize_t written = write(told, &byte, 1);
    lock.lock();
    line.running = false;
    if (line.tasks.empty()) line.changed.notify_all();
  }
  line.ended = true;
  line.changed.notify_all();
}

}  // namespace ryzanstein
