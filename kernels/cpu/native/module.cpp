// The Python binding. Tensors cross as addresses: a plain integer costs a tenth of a DLPack capsule.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "choosing.h"
#include "codec.h"
#include "program.h"
#include "steps.h"

namespace nb = nanobind;
using namespace ryzanstein;
using namespace nb::literals;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const Kernels* kernels_named(const std::string& name) {
  const Kernels* kernels = find_kernels(name.c_str());
  if (kernels == nullptr) {
    throw std::invalid_argument("no kernels named " + name + " run on this processor");
  }
  return kernels;
}

void check_rows(const Weight& w, int64_t first, int64_t count) {
  if (first < 0 || count < 0 || first + count > w.rows) {
    throw std::invalid_argument("rows outside the weight");
  }
}

template <auto kPack, typename T>
void pack(std::shared_ptr<Weight> w, int64_t first, uintptr_t source, int64_t count) {
  nb::gil_scoped_release release;
  check_rows(*w, first, count);
  kPack(*w, first, at<const T>(source), count);
}

// The kernels of one instruction set on a pool: what Python holds instead of raw pointers.
struct Device {
  const Kernels* kernels;
  std::shared_ptr<Pool> pool;

  Device(const std::string& name, int threads)
      : kernels(kernels_named(name)), pool(std::make_shared<Pool>(threads)) {}

  void choose(uintptr_t logits, int64_t vocab, uintptr_t rows, int64_t count, uintptr_t temperature,
              uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t uniform, uintptr_t ids,
              const std::vector<Edit>& edits) const {
    nb::gil_scoped_release release;
    const Choice choice{at<const int64_t>(rows), count, at<const float>(temperature), at<const int32_t>(top_k),
                        at<const float>(top_p), at<const float>(min_p), at<const double>(uniform)};
    ryzanstein::choose(*pool, *kernels, at<const float>(logits), vocab, choice, edits, at<int64_t>(ids));
  }

  // Operations, or bytes of `memory` read, a second on all threads: the best of several rounds.
  double probe(int kind, uintptr_t memory, int64_t bytes, int rounds) const {
    nb::gil_scoped_release release;
    const int64_t pieces = pool->threads() * 16;
    const int64_t share = bytes / pieces / 256 * 256;
    double best = 0.0;
    for (int round = 0; round < rounds; ++round) {
      std::atomic<int64_t> work{0};
      const Pool::Awake awake(*pool);
      const auto start = std::chrono::steady_clock::now();
      pool->run(pieces, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          work += kernels->probe(static_cast<Probe>(kind), at<const uint8_t>(memory) + i * share,
                                 share);
        }
      });
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
      best = std::max(best, static_cast<double>(work) / spent.count());
    }
    return best;
  }
};

// What is given by name, taken field by field.
class Fields {
 public:
  explicit Fields(const nb::kwargs& given) : given_(given) {}

  template <class T>
  void take(const char* name, T& field) {
    if (!given_.contains(name)) return;
    if constexpr (std::is_pointer_v<T>) {
      field = reinterpret_cast<T>(nb::cast<uintptr_t>(given_[name]));
    } else {
      field = nb::cast<T>(given_[name]);
    }
    ++taken_;
  }
  bool all_taken() const { return taken_ == given_.size(); }

 private:
  const nb::kwargs& given_;
  size_t taken_ = 0;
};

Instruction instruction(const std::string& op, const nb::kwargs& given) {
  const auto name = std::find(kOpNames.begin(), kOpNames.end(), op);
  if (name == kOpNames.end()) throw std::invalid_argument("no op is called " + op);
  Instruction i;
  i.op = static_cast<Op>(name - kOpNames.begin());
  Fields fields(given);
  fields.take("in_", i.in);
  fields.take("in2", i.in2);
  fields.take("in3", i.in3);
  fields.take("out", i.out);
  fields.take("out2", i.out2);
  fields.take("weight", i.weight);
  fields.take("vector", i.vector);
  fields.take("vector2", i.vector2);
  fields.take("vector3", i.vector3);
  fields.take("cosine", i.cosine);
  fields.take("sine", i.sine);
  fields.take("growth", i.growth);
  fields.take("target", i.target);
  fields.take("scalar", i.scalar);
  fields.take("factor", i.factor);
  fields.take("layer", i.layer);
  fields.take("heads", i.heads);
  fields.take("kv_heads", i.kv_heads);
  fields.take("activation", i.activation);
  fields.take("window", i.window);
  fields.take("first", i.first);
  fields.take("widths", i.widths);
  if (!fields.all_taken()) throw std::invalid_argument("an argument of " + op + " is unknown");
  return i;
}

// What an array holds, or None: nothing. An address would not do, since steps outlive what they are made of.
template <typename T>
std::vector<T> values_of(const nb::object& array) {
  std::vector<T> values;
  if (array.is_none()) return values;
  Py_buffer view;
  if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) throw nb::python_error();
  const bool fits = view.itemsize == sizeof(T);
  if (fits) values.assign(static_cast<const T*>(view.buf), static_cast<const T*>(view.buf) + view.len / view.itemsize);
  PyBuffer_Release(&view);
  if (!fits) throw std::invalid_argument("an array of a step has values of another size");
  return values;
}

std::unique_ptr<Step> make_step(const nb::object& token_ids, const nb::object& positions, const nb::object& kv_slots,
                                const nb::object& window_slots, const nb::object& sample_rows,
                                const nb::object& query_starts, const nb::object& context_lengths,
                                const nb::object& table_rows, const nb::object& kept_rows, const nb::object& kept_at,
                                int64_t fed, const nb::object& temperature, const nb::object& top_p,
                                const nb::object& min_p, const nb::object& top_k, const nb::object& uniform,
                                std::vector<int64_t> drawn, std::vector<int64_t> slots,
                                const std::vector<std::tuple<int64_t, int64_t, bool>>& copies) {
  StepInputs inputs{values_of<int64_t>(token_ids),
                    values_of<int64_t>(positions),
                    values_of<int64_t>(kv_slots),
                    values_of<int64_t>(window_slots),
                    values_of<int64_t>(sample_rows),
                    values_of<int32_t>(query_starts),
                    values_of<int32_t>(context_lengths),
                    values_of<int32_t>(table_rows),
                    values_of<int32_t>(kept_rows),
                    values_of<int32_t>(kept_at),
                    fed,
                    values_of<float>(temperature),
                    values_of<float>(top_p),
                    values_of<float>(min_p),
                    values_of<int32_t>(top_k),
                    values_of<double>(uniform),
                    std::move(drawn),
                    std::move(slots),
                    {}};
  for (const auto& [source, target, windowed] : copies) inputs.copies.push_back({source, target, windowed});
  inputs.check();
  return std::make_unique<Step>(std::move(inputs));
}

}  // namespace

NB_MODULE(_native, m) {
  // What is left when the process ends goes with it; nobody wants to read a list of it.
  nb::set_leak_warnings(false);
  // Names of the instruction sets that this processor runs, best first.
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : running_kernels()) names.push_back(kernels->name);
    return names;
  });
  nb::class_<Device>(m, "Device")
      .def(nb::init<const std::string&, int>(), "instructions"_a, "threads"_a)
      .def_prop_ro("rounds_pairs", [](const Device& d) { return d.kernels->rounds_pairs; })
      .def("choose", &Device::choose)
      .def("probe", &Device::probe, "kind"_a, "memory"_a, "bytes"_a, "rounds"_a);

  nb::class_<Weight>(m, "Weight")
      .def_prop_ro("bytes", [](const Weight& w) { return w.bytes; })
      .def_prop_ro("address", [](const Weight& w) { return reinterpret_cast<uintptr_t>(w.data); })
      .def_prop_ro("format", [](const Weight& w) { return static_cast<int>(w.format); });
  nb::class_<Arena>(m, "Arena").def(nb::init<>());
  m.def("make_weight", [](Arena& arena, int format, int64_t rows, int64_t columns) {
    return make_weight(arena, static_cast<Format>(format), rows, columns);
  });
  m.def("pack_q4_0", &pack<pack_q4_0, uint8_t>);
  m.def("pack_q4_1", &pack<pack_q4_1, uint8_t>);
  m.def("pack_q8_0", &pack<pack_q8_0, uint8_t>);
  m.def("pack_q4_k", &pack<pack_q4_k, uint8_t>);
  m.def("pack_mxfp4", &pack<pack_mxfp4, uint8_t>);
  m.def("pack_int4", &pack<pack_int4, float>);
  m.def("pack_int8", &pack<pack_int8, float>);
  m.def("pack_bf16", &pack<pack_bf16, float>);
  m.def("pack_f32", &pack<pack_f32, float>);
  m.def("pack_ternary", [](std::shared_ptr<Weight> w, int64_t first, uintptr_t signs, int64_t count,
                           float scale) {
    nb::gil_scoped_release release;
    check_rows(*w, first, count);
    pack_ternary(*w, first, at<const int8_t>(signs), count, scale);
  });

  nb::class_<LayerCache>(m, "LayerCache")
      .def("__init__",
           [](LayerCache* c, int format, uintptr_t keys, uintptr_t values, uintptr_t key_scales,
              uintptr_t value_scales, int64_t page_size, int64_t heads, int64_t dim,
              bool windowed) {
             new (c) LayerCache{static_cast<CacheFormat>(format), at<uint8_t>(keys),
                                at<uint8_t>(values), at<void>(key_scales), at<void>(value_scales),
                                page_size, heads, dim, windowed};
           },
           "format"_a, "keys"_a, "values"_a, "key_scales"_a, "value_scales"_a, "page_size"_a,
           "heads"_a, "dim"_a, "windowed"_a = false);
  nb::class_<LayerStates>(m, "LayerStates")
      .def("__init__",
           [](LayerStates* s, uintptr_t inputs, uintptr_t memory, int64_t taps, int64_t key_heads,
              int64_t value_heads, int64_t key_dim, int64_t value_dim, bool tiled) {
             new (s) LayerStates{at<float>(inputs), at<float>(memory), taps,      key_heads,
                                 value_heads,       key_dim,           value_dim, tiled};
           });
  nb::class_<PageCodec>(m, "PageCodec")
      .def("__init__",
           [](PageCodec* c, const Device& device, std::vector<LayerCache> layers, int format) {
             new (c) PageCodec(device.pool, device.kernels, std::move(layers),
                               static_cast<CacheFormat>(format));
           })
      .def_prop_ro("bytes", &PageCodec::bytes)
      .def("compress",
           [](const PageCodec& c, int64_t page, uintptr_t block) {
             nb::gil_scoped_release release;
             c.compress(page, at<uint8_t>(block));
           })
      .def("restore", [](const PageCodec& c, uintptr_t block, int64_t page) {
        nb::gil_scoped_release release;
        c.restore(at<uint8_t>(block), page);
      });

  nb::class_<Exchange>(m, "Exchange")
      .def("__init__",
           [](Exchange* e, int fd, int rank, int ranks, int64_t slot) {
             new (e) Exchange(fd, rank, ranks, slot);
           })
      .def_static("bytes", &Exchange::bytes)
      .def("gather",
           [](Exchange& e, const Device& device, uintptr_t in, int64_t rows,
              const std::vector<int64_t>& widths, uintptr_t out) {
             nb::gil_scoped_release release;
             e.gather(*device.pool, at<const float>(in), rows, widths, at<float>(out));
           })
      .def("sum",
           [](Exchange& e, const Device& device, uintptr_t in, int64_t rows, int64_t width,
              uintptr_t out) {
             nb::gil_scoped_release release;
             e.sum(*device.pool, at<const float>(in), rows, width, at<float>(out));
           })
      .def("abort", &Exchange::abort);

  nb::class_<Program>(m, "Program")
      .def("__init__",
           [](Program* p, const Device& device, int64_t max_rows,
              std::shared_ptr<Exchange> exchange) {
             new (p) Program(device.pool, device.kernels, max_rows, std::move(exchange));
           },
           "device"_a, "max_rows"_a, "exchange"_a.none() = nb::none())
      .def("add_buffer", &Program::add_buffer, "width"_a, "floats"_a, "groups"_a, "whole"_a,
           "bf16"_a, "times"_a = 1)
      .def("add_experts",
           [](Program& p, int in, int scores, int out, const Weight& gate_up, const Weight& down,
              uintptr_t gate_up_bias, uintptr_t down_bias, uintptr_t preference, uintptr_t factors,
              const std::array<int64_t, 7>& sizes, bool normalized, bool sigmoid, bool gated, float scale,
              int activation, const std::array<int, 4>& buffers) {
             p.add_experts(in, scores, out, gate_up, down, at<const float>(gate_up_bias),
                           at<const float>(down_bias), at<const float>(preference), at<const float>(factors),
                           {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], normalized,
                            sigmoid, gated, scale},
                           activation,
                           {buffers[0], buffers[1], buffers[2], buffers[3]});
           },
           nb::kw_only(), "in_"_a, "scores"_a, "out"_a, "gate_up"_a, "down"_a,
           "gate_up_bias"_a = 0, "down_bias"_a = 0, "preference"_a = 0, "factors"_a = 0, "sizes"_a,
           "normalized"_a, "sigmoid"_a = false, "gated"_a = false, "scale"_a = 1.0f, "activation"_a, "buffers"_a)
      .def("add_cache", &Program::add_cache, "cache"_a)
      .def("add_states", &Program::add_states, "states"_a)
      .def("add_short_conv",
           [](Program& p, int in, int out, int layer, uintptr_t taps, int channels) {
             p.add_short_conv(in, out, layer, at<const float>(taps), channels);
           },
           nb::kw_only(), "in_"_a, "out"_a, "layer"_a, "taps"_a, "channels"_a)
      .def("add_delta",
           [](Program& p, int in, int gates, int out, int layer, uintptr_t taps, uintptr_t decay,
              uintptr_t offset, int channels, int shares) {
             p.add_delta(in, gates, out, layer, at<const float>(taps), at<const float>(decay),
                         at<const float>(offset), channels, shares);
           },
           nb::kw_only(), "in_"_a, "gates"_a, "out"_a, "layer"_a, "taps"_a, "decay"_a, "offset"_a,
           "channels"_a, "shares"_a)
      .def("add_head_linear",
           [](Program& p, int in, int out, const std::shared_ptr<Weight>& weight, int heads) {
             p.add_head_linear(in, out, *weight, heads);
           },
           nb::kw_only(), "in_"_a, "out"_a, "weight"_a, "heads"_a)
      .def("add",
           [](Program& p, const std::string& op, const nb::kwargs& given) {
             p.add(instruction(op, given));
           },
           "op"_a, "given"_a)
      .def("profile", &Program::profile)
      .def_prop_ro("strands", &Program::strands)
      .def_prop_ro("samples", &Program::samples)
      .def("nanoseconds",
           [](const Program& p) {
             nb::dict result;
             for (size_t i = 0; i < kOpNames.size(); ++i) result[kOpNames[i]] = p.nanoseconds()[i];
             return result;
           })
      .def("run", [](Program& p, uintptr_t token_ids, uintptr_t positions, uintptr_t kv_slots,
                     uintptr_t query_starts, uintptr_t context_lengths, uintptr_t table_rows,
                     uintptr_t page_table, uintptr_t sample_rows, int64_t tokens,
                     int64_t sequences, int64_t samples, int64_t table_width,
                     uintptr_t kept_rows, uintptr_t kept_at, uintptr_t window_slots,
                     uintptr_t window_table) {
        nb::gil_scoped_release release;
        p.run({at<const int64_t>(token_ids), at<const int64_t>(positions),
               at<const int64_t>(kv_slots), at<const int32_t>(query_starts),
               at<const int32_t>(context_lengths), at<const int32_t>(table_rows),
               at<const int32_t>(page_table), at<const int64_t>(sample_rows), tokens, sequences,
               samples, table_width, at<const int32_t>(kept_rows), at<const int32_t>(kept_at),
               at<const int64_t>(window_slots), at<const int32_t>(window_table)});
      });

  nb::class_<Step>(m, "Step")
      .def_prop_ro("done", [](const Step& s) { return s.done.load(std::memory_order_acquire); })
      // (ids, seconds of copying, of the forward pass, and of choosing); raises what went wrong.
      .def("result", [](const Step& s) {
        if (s.error) std::rethrow_exception(s.error);
        return std::make_tuple(s.ids, s.move, s.forward, s.sample);
      });
  m.def("make_step", &make_step, nb::kw_only(), "token_ids"_a, "positions"_a, "kv_slots"_a,
        "window_slots"_a.none(), "sample_rows"_a, "query_starts"_a, "context_lengths"_a, "table_rows"_a,
        "kept_rows"_a.none(), "kept_at"_a.none(), "fed"_a, "temperature"_a, "top_p"_a, "min_p"_a, "top_k"_a,
        "uniform"_a, "drawn"_a, "slots"_a, "copies"_a);
  nb::class_<StepQueue>(m, "StepQueue")
      .def("__init__",
           [](StepQueue* q, const Device& device, uintptr_t pages, uintptr_t windows, int64_t width,
              int64_t page_size, uintptr_t seeds, uintptr_t last_ids) {
             new (q) StepQueue(device.pool, device.kernels,
                               {at<const int32_t>(pages), at<const int32_t>(windows), width, page_size,
                                at<const uint64_t>(seeds), at<int64_t>(last_ids)});
           },
           "device"_a, nb::kw_only(), "pages"_a, "windows"_a, "width"_a, "page_size"_a, "seeds"_a, "last_ids"_a)
      .def("following",
           [](const StepQueue& q, const Step& step) {
             return std::make_unique<Step>(step.inputs.following(q.tables()));
           })
      .def("submit",
           [](StepQueue& q, Step& step, Program& program, uintptr_t logits, int64_t vocab, int told) {
             q.submit(step, program, at<const float>(logits), vocab, told);
           })
      .def("drain", &StepQueue::drain, nb::call_guard<nb::gil_scoped_release>())
      .def("close", &StepQueue::close, nb::call_guard<nb::gil_scoped_release>(), "seconds"_a);
}
