// Matmuls on packed weights. Byte products multiply four inputs at a time into 16 lanes, one lane for
// each output row of a tile.
#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

// Lines of `Soon` that a step fetches at most: some 7 GB/s a thread, which leaves the weights their share.
constexpr int64_t kSoonLines = 4;

// What other ops read soon, fetched from step to step.
class Fetcher {
 public:
  Fetcher(const Soon& soon, int64_t steps)
      : piece_(soon.pieces), end_(soon.pieces + soon.count), at_(soon.count ? piece_->begin : nullptr) {
    int64_t bytes = 0;
    for (const Soon::Piece* piece = piece_; piece != end_; ++piece) bytes += piece->end - piece->begin;
    lines_ = bytes ? least((bytes / 64 + steps - 1) / steps, kSoonLines) : 0;
  }

  void step() {
    for (int64_t i = 0; i < lines_ && piece_ != end_; ++i) {
      _mm_prefetch(at_, _MM_HINT_T1);
      at_ += 64;
      if (at_ >= piece_->end && ++piece_ != end_) at_ = piece_->begin;
    }
  }

 private:
  const Soon::Piece *piece_, *end_;
  const uint8_t* at_;
  int64_t lines_;
};

// The tiles that come after, fetched while these are computed: memory would idle otherwise, since all
// rows but a pass's first find the weights in the cache. Into the second level, since the first is full
// of these tiles and of activations.
struct Ahead {
  const uint8_t* at;
  const uint8_t* end;
  int64_t lines;  // a step
  Fetcher* soon;  // goes on from pass to pass

  void step() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    if (soon) soon->step();
  }
};

// A format's `accumulate<T, R>` adds x[row..row+R) . w[T tiles from `tile`] to sum[T][R]. `kTiles` x
// `kRows` is the largest pass whose products fit the registers beside the weights: every activation that
// is broadcast feeds all tiles, every weight all rows. `steps` is how often it calls ahead.step(), `kBytes`
// the size of an activation.
template <Format kFormat>
struct FourBit {
  static constexpr int kTiles = kWide ? 2 : 1, kRows = kWide ? 6 : 4, kBytes = 1, kFew = kWide ? 4 : 2;
  static constexpr bool kEven = kFormat == Format::kQ4Even, kSuper = kFormat == Format::kQ4Super;

  static int64_t steps(const Weight& w) { return w.groups(); }

  // Of a tile's group; `factor` only where groups have one in common.
  static Floats scale(const uint8_t* tile, int64_t group, Floats factor) {
    const uint8_t* head = tile + Weight::scales_at(kFormat, group);
    return kSuper ? mul(factor, load_whole(head)) : load_half(reinterpret_cast<const uint16_t*>(head));
  }

  static Floats minimum(const uint8_t* tile, int64_t group, Floats factor) {
    const uint8_t* head = tile + Weight::scales_at(kFormat, group);
    return kSuper ? mul(factor, load_whole(head + 16)) : load_half(reinterpret_cast<const uint16_t*>(head + 32));
  }

  template <int T, int R>
  static void accumulate(const Weight& w, const Activations& x, int64_t row, int64_t tile,
                         Ahead ahead, Floats (&sum)[T][R]) {
    const int64_t groups = w.groups(), width = w.columns, stride = w.tile_bytes();
    const uint8_t* data = w.tile(tile);
    const int8_t* values = x.values + row * width;
    Floats scale_factor[T], minimum_factor[T];
    UNROLL for (int t = 0; t < T; ++t) scale_factor[t] = minimum_factor[t] = zero();
    for (int64_t g = 0; g < groups; ++g) {
      ahead.step();
      if (kSuper && g % 8 == 0) {
        UNROLL for (int t = 0; t < T; ++t) {
          const auto* factors = reinterpret_cast<const uint16_t*>(data + t * stride + Weight::factors_at(g));
          scale_factor[t] = load_half(factors);
          minimum_factor[t] = load_half(factors + 16);
        }
      }
      const uint8_t* bytes = data + Weight::bytes_at(kFormat, g);
      Partial dot[T][R];
      int32_t middle[R];  // what 8 a weight adds; nothing where there is a minimum
      UNROLL for (int r = 0; r < R; ++r) {
        middle[r] = kEven ? x.offsets[(row + r) * groups + g] / 16 : 0;
        UNROLL for (int t = 0; t < T; ++t) dot[t][r] = products_from(middle[r]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Bytes first[T], second[T];
        UNROLL for (int t = 0; t < T; ++t) {
          const Bytes packed = load_bytes(bytes + t * stride + 64 * j);
          first[t] = field<0, 4>(packed);
          second[t] = field<4, 4>(packed);
        }
        UNROLL for (int r = 0; r < R; ++r) {
          const int8_t* v = values + r * width + g * kGroup + 4 * j;
          const Bytes a = broadcast4(v), b = broadcast4(v + 16);
          UNROLL for (int t = 0; t < T; ++t) {
            dot[t][r] = dot_partial(dot[t][r], first[t], a);
            dot[t][r] = dot_partial(dot[t][r], second[t], b);
          }
        }
      }
      UNROLL for (int t = 0; t < T; ++t) {
        const Floats factors = scale(data + t * stride, g, scale_factor[t]);
        UNROLL for (int r = 0; r < R; ++r) {
          const int64_t at = (row + r) * groups + g;
          const Floats factor = mul(factors, set1(x.scales[at]));
          sum[t][r] = fma(to_floats(products_of(dot[t][r], middle[r])), factor, sum[t][r]);
        }
        if constexpr (!kEven) {
          const Floats added = minimum(data + t * stride, g, minimum_factor[t]);
          UNROLL for (int r = 0; r < R; ++r) {
            sum[t][r] = fma(added, set1(x.sums[(row + r) * groups + g]), sum[t][r]);
          }
        }
      }
    }
  }
};

struct Float4 {
  static constexpr int kTiles = kWide ? 2 : 1, kRows = kWide ? 6 : 4, kBytes = 1, kFew = kWide ? 4 : 2;

  static int64_t steps(const Weight& w) { return w.groups(); }

  template <int T, int R>
  static void accumulate(const Weight& w, const Activations& x, int64_t row, int64_t tile,
                         Ahead ahead, Floats (&sum)[T][R]) {
    const int64_t groups = w.groups(), width = w.columns, stride = w.tile_bytes();
    const uint8_t* data = w.tile(tile);
    const int8_t* values = x.values + row * width;
    for (int64_t g = 0; g < groups; ++g) {
      ahead.step();
      const uint8_t* bytes = data + Weight::bytes_at(Format::kFloat4, g);
      Ints whole[T][R];
      UNROLL for (int r = 0; r < R; ++r) {
        // What the codes' offset adds: an offset of int8 is -128 times the sum of activations.
        const Ints start = set1_int(x.offsets[(row + r) * groups + g] / 128 * kFloat4Offset);
        UNROLL for (int t = 0; t < T; ++t) whole[t][r] = start;
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Partial dot[T][R];
        UNROLL for (int t = 0; t < T; ++t) {
          UNROLL for (int r = 0; r < R; ++r) dot[t][r] = no_products();
        }
#pragma GCC unroll 2
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          Bytes first[T], second[T];
          UNROLL for (int t = 0; t < T; ++t) {
            const Bytes packed = load_bytes(bytes + t * stride + 64 * j);
            first[t] = lookup(kFloat4Codes, field<0, 4>(packed));
            second[t] = lookup(kFloat4Codes, field<4, 4>(packed));
          }
          UNROLL for (int r = 0; r < R; ++r) {
            const int8_t* v = values + r * width + g * kGroup + 4 * j;
            const Bytes a = broadcast4(v), b = broadcast4(v + 16);
            UNROLL for (int t = 0; t < T; ++t) {
              dot[t][r] = dot_partial(dot[t][r], first[t], a);
              dot[t][r] = dot_partial(dot[t][r], second[t], b);
            }
          }
        }
        UNROLL for (int t = 0; t < T; ++t) {
          UNROLL for (int r = 0; r < R; ++r) whole[t][r] = add(whole[t][r], widen(dot[t][r]));
        }
      }
      UNROLL for (int t = 0; t < T; ++t) {
        const Floats scale = load_exponents(data + Weight::scales_at(Format::kFloat4, g) + t * stride);
        UNROLL for (int r = 0; r < R; ++r) {
          const Floats factor = mul(scale, set1(0.5f * x.scales[(row + r) * groups + g]));
          sum[t][r] = fma(to_floats(whole[t][r]), factor, sum[t][r]);
        }
      }
    }
  }
};

struct EightBit {
  static constexpr int kTiles = kWide ? 2 : 1, kRows = kWide ? 6 : 4, kBytes = 1, kFew = kWide ? 4 : 2;

  static int64_t steps(const Weight& w) { return w.groups(); }

  template <int T, int R>
  static void accumulate(const Weight& w, const Activations& x, int64_t row, int64_t tile,
                         Ahead ahead, Floats (&sum)[T][R]) {
    const int64_t groups = w.groups(), width = w.columns, stride = w.tile_bytes();
    const uint8_t* data = w.tile(tile);
    const int8_t* values = x.values + row * width;
    for (int64_t g = 0; g < groups; ++g) {
      ahead.step();
      const uint8_t* bytes = data + Weight::bytes_at(Format::kQ8, g);
      Ints dot[T][R];
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int t = 0; t < T; ++t) dot[t][r] = start_signed(x.offsets + (row + r) * groups + g);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        Signed packed[T];
        UNROLL for (int t = 0; t < T; ++t) packed[t] = load_signed(bytes + t * stride + 64 * j);
        UNROLL for (int r = 0; r < R; ++r) {
          const Bytes v = broadcast4(values + r * width + g * kGroup + 4 * j);
          UNROLL for (int t = 0; t < T; ++t) dot[t][r] = dot_signed(dot[t][r], packed[t], v);
        }
      }
      UNROLL for (int t = 0; t < T; ++t) {
        const uint8_t* scales = data + Weight::scales_at(Format::kQ8, g) + t * stride;
        const Floats scale = load_half(reinterpret_cast<const uint16_t*>(scales));
        UNROLL for (int r = 0; r < R; ++r) {
          const Floats factor = mul(scale, set1(x.scales[(row + r) * groups + g]));
          sum[t][r] = fma(to_floats(dot[t][r]), factor, sum[t][r]);
        }
      }
    }
  }
};

struct Ternary {
  static constexpr int kTiles = kWide ? 2 : 1, kRows = kWide ? 6 : 4, kBytes = 1, kFew = 1;

  static int64_t steps(const Weight& w) { return w.chunks(); }

  template <int T, int R>
  static void accumulate(const Weight& w, const Activations& x, int64_t row, int64_t tile,
                         Ahead ahead, Floats (&sum)[T][R]) {
    const int64_t chunks = w.chunks(), stride = w.tile_bytes();
    const int64_t width = Activations::row_stride(w.columns);
    const uint8_t* data = w.tile(tile);
    const int8_t* values = x.row_values + row * width;
    Ints dot[T][R];
    UNROLL for (int t = 0; t < T; ++t) {
      UNROLL for (int r = 0; r < R; ++r) dot[t][r] = set1_int(x.row_offsets[row + r]);
    }
    for (int64_t c = 0; c < chunks;) {
      Partial part[T][R];
      UNROLL for (int t = 0; t < T; ++t) {
        UNROLL for (int r = 0; r < R; ++r) part[t][r] = no_products();
      }
      for (const int64_t end = least(c + kPartialDots / 4, chunks); c < end; ++c) {
        ahead.step();
        Bytes packed[T];
        UNROLL for (int t = 0; t < T; ++t) packed[t] = load_bytes(data + t * stride);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Bytes codes[T];
          UNROLL for (int t = 0; t < T; ++t) {
            codes[t] = field<0, 2>(packed[t]);
            packed[t] = shift_right<2>(packed[t]);
          }
          UNROLL for (int r = 0; r < R; ++r) {
            const Bytes v = broadcast4(values + r * width + 4 * j);
            UNROLL for (int t = 0; t < T; ++t) part[t][r] = dot_partial(part[t][r], codes[t], v);
          }
        }
        data += 64;
        values += kChunk;
      }
      UNROLL for (int t = 0; t < T; ++t) {
        UNROLL for (int r = 0; r < R; ++r) dot[t][r] = add(dot[t][r], widen(part[t][r]));
      }
    }
    UNROLL for (int t = 0; t < T; ++t) {
      const Floats scale = load(reinterpret_cast<const float*>(data + t * stride));
      UNROLL for (int r = 0; r < R; ++r) {
        sum[t][r] = mul(to_floats(dot[t][r]), mul(scale, set1(x.row_scales[row + r])));
      }
    }
  }
};

struct Bf16 {
  static constexpr int kTiles = kWide ? 2 : 1, kRows = kWide ? 6 : 4, kFew = kWide ? 8 : 3;
  static constexpr int kBytes = sizeof(PairValue);

  static int64_t steps(const Weight& w) { return w.columns / 2; }

  template <int T, int R>
  static void accumulate(const Weight& w, const Activations& x, int64_t row, int64_t tile,
                         Ahead ahead, Floats (&sum)[T][R]) {
    const int64_t width = w.columns, stride = w.tile_bytes();
    const uint8_t* data = w.tile(tile);
    const void* rows = kBytes == 2 ? static_cast<const void*>(x.bf16) : x.floats;
    const PairValue* values = static_cast<const PairValue*>(rows) + row * width;
    for (int64_t i = 0; i < width; i += 2, data += 64) {
      ahead.step();
      Pairs packed[T];
      UNROLL for (int t = 0; t < T; ++t) packed[t] = load_pairs(data + t * stride);
      UNROLL for (int r = 0; r < R; ++r) {
        const Pairs v = broadcast_pair(values + r * width + i);
        UNROLL for (int t = 0; t < T; ++t) sum[t][r] = dot_pairs(sum[t][r], packed[t], v);
      }
    }
  }
};

struct Float {
  static constexpr int kTiles = kWide ? 2 : 1, kRows = 6, kBytes = 4, kFew = kWide ? 8 : 3;

  static int64_t steps(const Weight& w) { return w.columns; }

  template <int T, int R>
  static void accumulate(const Weight& w, const Activations& x, int64_t row, int64_t tile,
                         Ahead ahead, Floats (&sum)[T][R]) {
    const int64_t width = w.columns, stride = w.tile_bytes();
    const uint8_t* data = w.tile(tile);
    const float* values = x.floats + row * width;
    for (int64_t i = 0; i < width; ++i, data += 64) {
      ahead.step();
      Floats packed[T];
      UNROLL for (int t = 0; t < T; ++t) packed[t] = load(reinterpret_cast<const float*>(data + t * stride));
      UNROLL for (int r = 0; r < R; ++r) {
        const Floats v = set1(values[r * width + i]);
        UNROLL for (int t = 0; t < T; ++t) sum[t][r] = fma(packed[t], v, sum[t][r]);
      }
    }
  }
};

template <class F, int T, int R>
void pass(const Weight& w, const Activations& x, int64_t row, int64_t tile, Ahead ahead,
          const float* bias, float* y) {
  Floats sum[T][R];
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int r = 0; r < R; ++r) sum[t][r] = zero();
  }
  F::template accumulate<T, R>(w, x, row, tile, ahead, sum);
  UNROLL for (int t = 0; t < T; ++t) {
    const int64_t out = (tile + t) * kTile, valid = w.rows - out;
    UNROLL for (int r = 0; r < R; ++r) {
      if (bias) sum[t][r] = add(sum[t][r], load(bias + out, valid));
      store(y + (row + r) * w.rows + out, sum[t][r], valid);
    }
  }
}

template <class F, int T, int R>
void pass_of(int64_t count, const Weight& w, const Activations& x, int64_t row, int64_t tile,
             Ahead ahead, const float* bias, float* y) {
  if constexpr (R > 0) {
    if (count == R) return pass<F, T, R>(w, x, row, tile, ahead, bias, y);
    pass_of<F, T, R - 1>(count, w, x, row, tile, ahead, bias, y);
  }
}

// Up to `kFew` rows, a measured crossover: a tile at a time is one sequential read, which the hardware
// fetches best by itself.
template <class F>
void multiply_few(const Weight& w, const Activations& x, int64_t row, int64_t rows,
                  const float* bias, float* y, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    pass_of<F, 1, F::kFew>(rows, w, x, row, tile, Ahead{nullptr, nullptr, 0, nullptr}, bias, y);
  }
}

// Rows [row, row + rows) of tiles [first, last). With `fetch` the next tiles are fetched meanwhile, in the end
// those of `then`.
template <class F>
void multiply_block(const Weight& w, const Activations& x, int64_t row, int64_t rows,
                    const float* bias, float* y, int64_t first, int64_t last, bool fetch,
                    const Soon::Piece& then, Fetcher* soon) {
  // Passes of nearly equal size: 8 rows are 4 + 4, not 6 + 2.
  const int64_t passes = (rows + F::kRows - 1) / F::kRows, bytes = F::kTiles * w.tile_bytes();
  const int64_t lines = fetch ? bytes / 64 / (passes * F::steps(w)) + 1 : 0;
  for (int64_t tile = first; tile < last; tile += F::kTiles) {
    const bool leaves = then.begin && tile + F::kTiles >= last;
    const uint8_t* next = leaves ? then.begin : w.tile(tile + F::kTiles);
    const uint8_t* end = leaves ? then.end : w.data + w.bytes;
    for (int64_t n = 0, done = 0; n < passes; ++n) {
      const int64_t count = (rows - done + passes - n - 1) / (passes - n);
      const uint8_t* share = next + bytes * (n + 1) / passes;
      const Ahead ahead{next + bytes * n / passes / 64 * 64, share < end ? share : end, lines,
                        soon};
      if (last - tile >= F::kTiles) {
        pass_of<F, F::kTiles, F::kRows>(count, w, x, row + done, tile, ahead, bias, y);
      } else {
        pass_of<F, 1, F::kRows>(count, w, x, row + done, tile, ahead, bias, y);
      }
      done += count;
    }
  }
}

// Activations of a block of rows stay in the second-level cache while all tiles go by.
constexpr int64_t kBlockBytes = 192 << 10;

template <class F>
void multiply(const Weight& w, const Activations& x, int64_t row, int64_t rows, const float* bias,
              float* y, int64_t first, int64_t last, const Soon& soon) {
  if (rows <= F::kFew) return multiply_few<F>(w, x, row, rows, bias, y, first, last);
  const int64_t fitting = most(kBlockBytes / (w.columns * F::kBytes), 4 * F::kRows);
  const int64_t blocks = (rows + fitting - 1) / fitting;
  const int64_t passes = (rows + F::kRows - 1) / F::kRows;
  Fetcher fetcher(soon, F::steps(w) * passes * ((last - first + F::kTiles - 1) / F::kTiles));
  for (int64_t n = 0, done = 0; n < blocks; ++n) {
    const int64_t count = (rows - done + blocks - n - 1) / (blocks - n);
    multiply_block<F>(w, x, row + done, count, bias, y, first, last, n == 0, soon.tiles,
                      soon.count ? &fetcher : nullptr);
    done += count;
  }
}

}  // namespace

void matmul(const Weight& w, const Activations& x, int64_t row, int64_t rows, const float* bias,
            float* y, int64_t first, int64_t last, const Soon& soon) {
  switch (w.format) {
    case Format::kF32: return multiply<Float>(w, x, row, rows, bias, y, first, last, soon);
    case Format::kBf16: return multiply<Bf16>(w, x, row, rows, bias, y, first, last, soon);
    case Format::kQ8: return multiply<EightBit>(w, x, row, rows, bias, y, first, last, soon);
    case Format::kQ4: return multiply<FourBit<Format::kQ4>>(w, x, row, rows, bias, y, first, last, soon);
    case Format::kQ4Super:
      return multiply<FourBit<Format::kQ4Super>>(w, x, row, rows, bias, y, first, last, soon);
    case Format::kQ4Even:
      return multiply<FourBit<Format::kQ4Even>>(w, x, row, rows, bias, y, first, last, soon);
    case Format::kFloat4: return multiply<Float4>(w, x, row, rows, bias, y, first, last, soon);
    case Format::kTernary: return multiply<Ternary>(w, x, row, rows, bias, y, first, last, soon);
  }
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
