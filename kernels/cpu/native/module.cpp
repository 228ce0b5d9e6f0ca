// The Python binding. Tensors cross as addresses: a plain integer costs a tenth of a DLPack capsule.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>

#include "program.h"

namespace nb = nanobind;
using namespace ryzanstein;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using PackBlocks = std::shared_ptr<Weight> (*)(const uint8_t*, int64_t, int64_t);
using PackFloats = std::shared_ptr<Weight> (*)(const float*, int64_t, int64_t);

template <PackBlocks Pack>
std::shared_ptr<Weight> pack_blocks(uintptr_t blocks, int64_t rows, int64_t columns) {
  nb::gil_scoped_release release;
  return Pack(at<const uint8_t>(blocks), rows, columns);
}

template <PackFloats Pack>
std::shared_ptr<Weight> pack_floats(uintptr_t values, int64_t rows, int64_t columns) {
  nb::gil_scoped_release release;
  return Pack(at<const float>(values), rows, columns);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("supported", &supported);
  // ids[i] = the token of logits row rows[i]: a draw where temperature[row] > 0, else the likeliest.
  m.def("choose", [](std::shared_ptr<Pool> pool, uintptr_t logits, int64_t vocab, uintptr_t rows,
                     int64_t count, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p,
                     uintptr_t min_p, uintptr_t uniform, uintptr_t ids) {
    nb::gil_scoped_release release;
    // One row is not worth waking anybody.
    if (count > 1) pool->begin();
    pool->run(count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = at<const int64_t>(rows)[i];
        const float* x = at<const float>(logits) + row * vocab;
        const Filters filters{at<const float>(temperature)[row], at<const int32_t>(top_k)[row],
                              at<const float>(top_p)[row], at<const float>(min_p)[row],
                              at<const double>(uniform)[row]};
        at<int64_t>(ids)[i] =
            filters.temperature > 0.0f ? draw(x, vocab, filters) : argmax(x, vocab);
      }
    });
    if (count > 1) pool->end();
  });
  nb::class_<Pool>(m, "Pool").def(nb::init<int>(), nb::arg("threads"));
  nb::class_<Weight>(m, "Weight")
      .def_prop_ro("bytes", [](const Weight& w) { return w.bytes; })
      .def_prop_ro("bf16", [](const Weight& w) { return w.format == Format::kBf16; });
  m.def("pack_q4_0", &pack_blocks<pack_q4_0>);
  m.def("pack_q4_1", &pack_blocks<pack_q4_1>);
  m.def("pack_q8_0", &pack_blocks<pack_q8_0>);
  m.def("pack_int8", &pack_floats<pack_int8>);
  m.def("pack_bf16", &pack_floats<pack_bf16>);
  nb::class_<Program>(m, "Program")
      .def(nb::init<std::shared_ptr<Pool>, int64_t>(), nb::arg("pool"), nb::arg("max_rows"))
      .def("add_buffer", &Program::add_buffer, nb::arg("width"), nb::arg("floats"),
           nb::arg("int8"), nb::arg("bf16"))
      .def("add_cache",
           [](Program& p, uintptr_t keys, uintptr_t values, int64_t page_size, int64_t heads,
              int64_t dim) {
             p.add_cache(at<uint16_t>(keys), at<uint16_t>(values), page_size, heads, dim);
           })
      .def("embed", &Program::embed)
      .def("rms_norm",
           [](Program& p, int in, int out, uintptr_t weight, float eps) {
             p.rms_norm(in, out, at<const float>(weight), eps);
           })
      .def("add_rms_norm",
           [](Program& p, int in, int residual, int out, int sum, uintptr_t weight, float eps) {
             p.add_rms_norm(in, residual, out, sum, at<const float>(weight), eps);
           })
      .def("linear",
           [](Program& p, int in, int out, std::shared_ptr<Weight> weight, uintptr_t bias) {
             p.linear(in, out, std::move(weight), at<const float>(bias));
           })
      .def("rope_write_kv",
           [](Program& p, int in, int out, int layer, int query_heads, uintptr_t cosine,
              uintptr_t sine, uintptr_t query_norm, uintptr_t key_norm, float eps) {
             p.rope_write_kv(in, out, layer, query_heads, at<const float>(cosine),
                             at<const float>(sine), at<const float>(query_norm),
                             at<const float>(key_norm), eps);
           })
      .def("attention", &Program::attention)
      .def("gated", &Program::gated)
      .def("select_rows", &Program::select_rows)
      .def("logits",
           [](Program& p, int in, std::shared_ptr<Weight> weight, uintptr_t bias, uintptr_t out) {
             p.logits(in, std::move(weight), at<const float>(bias), at<float>(out));
           })
      .def("profile", &Program::profile)
      .def("nanoseconds",
           [](const Program& p) {
             nb::dict result;
             const char* names[Program::kOps] = {"embed",     "rms_norm", "add_rms_norm",
                                                 "linear",    "rope_write_kv",
                                                 "attention", "gated",    "select_rows"};
             for (int i = 0; i < Program::kOps; ++i) result[names[i]] = p.nanoseconds()[i];
             return result;
           })
      .def("run", [](Program& p, uintptr_t token_ids, uintptr_t positions, uintptr_t kv_slots,
                     uintptr_t query_starts, uintptr_t context_lengths, uintptr_t table_rows,
                     uintptr_t page_table, uintptr_t sample_rows, int64_t tokens,
                     int64_t sequences, int64_t samples, int64_t table_width) {
        nb::gil_scoped_release release;
        p.run({at<const int64_t>(token_ids), at<const int64_t>(positions),
               at<const int64_t>(kv_slots), at<const int32_t>(query_starts),
               at<const int32_t>(context_lengths), at<const int32_t>(table_rows),
               at<const int32_t>(page_table), at<const int64_t>(sample_rows), tokens, sequences,
               samples, table_width});
      });
}
