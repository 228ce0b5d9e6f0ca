// Everything that works on one row at a time. Sums run in 16 fixed lanes, then across the lanes.
#include <cmath>

#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

void store_group(const float* x, Activations::Group& out) {
  const Floats a = load(x), b = load(x + 16);
  float largest = max_lanes(max(abs(a), abs(b)));
  if (largest < kSmallest) largest = 0.0f;
  const float scale = largest / 127.0f;
  const Floats inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
  const Ints qa = to_ints(mul(a, inverse)), qb = to_ints(mul(b, inverse));
  store_int8(out.values, qa);
  store_int8(out.values + 16, qb);
  const int32_t sum = sum_lanes(add(qa, qb));
  out.scale = scale;
  out.sum = scale * static_cast<float>(sum);
  out.offset8 = -8 * sum;
  out.offset128 = -128 * sum;
}

// A whole row under one scale, as BitNet b1.58 does it (arXiv 2402.17764).
void store_whole(const float* x, int64_t width, int64_t row, const Activations& out) {
  Floats highest = zero();
  for (int64_t i = 0; i < width; i += 16) highest = max(highest, abs(load(x + i, width - i)));
  const float largest = max_lanes(highest) > 1e-5f ? max_lanes(highest) : 1e-5f;
  const Floats factor = set1(127.0f / largest);
  int8_t* values = out.row_values + row * Activations::row_stride(width);
  Ints sum = set1_int(0);
  for (int64_t i = 0; i < width; i += 16) {
    const Ints q = to_ints(mul(load(x + i, width - i), factor));
    store_int8(values + i, q);
    sum = add(sum, q);
  }
  out.row_scales[row] = 1.0f / (127.0f / largest);
  out.row_offsets[row] = -sum_lanes(sum);
}

void store_bf16_row(const float* x, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < width; i += 16) store_bf16(out + i, load(x + i, width - i), width - i);
}

template <int kActivation>
inline Floats activate(Floats gate) {
  if constexpr (kActivation == 0) {
    return mul(gate, sigmoid(gate));
  } else if constexpr (kActivation == 1) {
    // 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) (g + 0.044715 g^3)
    const Floats cube = mul(mul(gate, gate), gate);
    const Floats inner = fma(set1(0.044715f), cube, gate);
    return mul(gate, sigmoid(mul(set1(1.5957691216f), inner)));
  } else {
    const Floats positive = max(gate, zero());
    return mul(positive, positive);
  }
}

template <class Activate>
inline void gate_with(const float* x, const float* gate, int64_t width, float* out,
                      const Activate& activated) {
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t left = width - i;
    store(out + i, mul(load(x + i, left), activated(load(gate + i, left))), left);
  }
}

template <int kActivation>
inline Floats gate_of(Floats gate, Floats up) {
  if constexpr (kActivation == 3) {
    const Floats most = set1(7.0f), within = min(gate, most);
    const Floats added = add(max(min(up, most), set1(-7.0f)), set1(1.0f));
    return mul(mul(within, sigmoid(mul(set1(1.702f), within))), added);
  } else {
    return mul(activate<kActivation>(gate), up);
  }
}

template <int kActivation>
void gated(const float* x, int64_t width, float* out) {
  const int64_t whole = width / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    store(out + i, gate_of<kActivation>(load(x + i), load(x + width + i)));
  }
  if (const int64_t left = width - whole) {
    const Floats gate = load(x + whole, left), up = load(x + width + whole, left);
    store(out + whole, gate_of<kActivation>(gate, up), left);
  }
}

}  // namespace

void store_forms(const float* x, int64_t width, int64_t row, const Activations& out) {
  if (out.groups) {
    const int64_t groups = width / kGroup;
    for (int64_t g = 0; g < groups; ++g) store_group(x + g * kGroup, out.groups[row * groups + g]);
  }
  if (out.row_values) store_whole(x, width, row, out);
  if (out.bf16) store_bf16_row(x, width, out.bf16 + row * width);
}

void embed_row(const Weight& table, int64_t index, float scale, float* out) {
  const int64_t width = table.columns, lane = index % kTile;
  const uint8_t* tile = table.tile(index / kTile);
  if (table.format == Format::kF32) {
    const auto* data = reinterpret_cast<const float*>(tile);
    for (int64_t i = 0; i < width; ++i) out[i] = data[i * kTile + lane] * scale;
    return;
  }
  if (table.format == Format::kBf16) {
    const auto* data = reinterpret_cast<const uint16_t*>(tile) + lane * 2;
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t raw = uint32_t{data[i / 2 * kTile * 2 + i % 2]} << 16;
      std::memcpy(out + i, &raw, 4);
      out[i] *= scale;
    }
    return;
  }
  const bool super = table.format == Format::kQ4Super, eight = table.format == Format::kQ8;
  const bool float4 = table.format == Format::kFloat4, even = table.format == Format::kQ4Even;
  for (int64_t g = 0; g < table.groups(); ++g) {
    const uint8_t* head = tile + table.scales_at(g);
    const uint8_t* bytes = tile + table.bytes_at(g) + 4 * lane;
    float scales[16], minima[16];
    const auto* factors = reinterpret_cast<const uint16_t*>(tile + Weight::factors_at(g));
    store(scales, super    ? mul(load_half(factors), load_whole(head))
                  : float4 ? mul(load_exponents(head), set1(0.5f))
                           : load_half(reinterpret_cast<const uint16_t*>(head)));
    store(minima, eight  ? set1(-128.0f * scales[lane])
                  : even   ? set1(-8.0f * scales[lane])
                  : float4 ? set1(-kFloat4Offset * scales[lane])
                  : super ? mul(load_half(factors + 16), load_whole(head + 16))
                         : load_half(reinterpret_cast<const uint16_t*>(head + 32)));
    for (int i = 0; i < kGroup; ++i) {
      const int byte = bytes[64 * (eight ? i / 4 : i % 16 / 4) + i % 4];
      const int nibble = i < 16 ? byte & 15 : byte >> 4;
      const int code = eight ? byte : float4 ? kFloat4Codes[nibble] : nibble;
      out[g * kGroup + i] = (scales[lane] * static_cast<float>(code) + minima[lane]) * scale;
    }
  }
}

float squared_norm(const float* x, int64_t width) {
  Floats squares = zero();
  for (int64_t i = 0; i < width; i += 16) {
    const Floats v = load(x + i, width - i);
    squares = fma(v, v, squares);
  }
  return sum_lanes(squares);
}

void scale_row(const float* x, const float* weight, float factor, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const Floats v = mul(load(x + i, width - i), set1(factor));
    store(out + i, mul(v, load(weight + i, width - i)), width - i);
  }
}

void rms_norm_row(const float* x, const float* weight, float eps, int64_t width, float* out) {
  const float mean = squared_norm(x, width) / static_cast<float>(width);
  scale_row(x, weight, 1.0f / std::sqrt(mean + eps), width, out);
}

void add_row(const float* a, const float* b, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    store(out + i, add(load(a + i, width - i), load(b + i, width - i)), width - i);
  }
}

void gated_row(const float* x, int64_t width, int activation, float* out) {
  switch (activation) {
    case 0: return gated<0>(x, width, out);
    case 1: return gated<1>(x, width, out);
    case 2: return gated<2>(x, width, out);
    default: return gated<3>(x, width, out);
  }
}

void gate_row(const float* x, const float* gate, int64_t width, int activation, float* out) {
  switch (activation) {
    case 0: return gate_with(x, gate, width, out, [](Floats g) { return sigmoid(g); });
    case 1: return gate_with(x, gate, width, out, [](Floats g) { return activate<0>(g); });
    default: return gate_with(x, gate, width, out, [](Floats g) { return activate<1>(g); });
  }
}

void softcap_row(float cap, int64_t width, float* x) {
  // tanh(u) = 2 sigmoid(2u) - 1
  const Floats inner = set1(2.0f / cap), outer = set1(2.0f * cap), least = set1(-cap);
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t left = width - i;
    store(x + i, fma(outer, sigmoid(mul(load(x + i, left), inner)), least), left);
  }
}

void rotate_head(float* head, const float* cosine, const float* sine, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t left = half - i;
    const Floats low = load(head + i, left), high = load(head + half + i, left);
    const Floats c = load(cosine + i, left), s = load(sine + i, left);
    const Floats first = sub(mul(low, c), mul(high, s));
    store(head + half + i, add(mul(high, c), mul(low, s)), left);
    store(head + i, first, left);
  }
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
