// Matmuls on packed weights. Byte products multiply four inputs at a time into 16 lanes, one lane for
// each output row of a tile.
#include "ahead.h"
#include "isa.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {
namespace {

// What all passes of a matmul have in common.
struct Job {
  Job(const Weight& w, const Activations& x, const float* bias, float* y)
      : w(w), x(x), bias(bias), y(y), groups(w.groups()), stride(w.tile_bytes()) {}

  const uint8_t* tile(int64_t number) const { return w.data + number * stride; }

  const Weight& w;
  const Activations& x;
  const float* bias;
  float* y;
  const int64_t groups, stride;
};

// The tiles of a pass, from an offset into each.
template <int T>
struct Tiles {
  Tiles(const uint8_t* first, int64_t stride) {
    UNROLL for (int t = 0; t < T; ++t) at[t] = now(first + t * stride);
  }
  const uint8_t* operator[](int t) const { return at[t]; }

  const uint8_t* at[T];
};

// The rows of a pass, group by group.
template <int R>
struct GroupRows {
  GroupRows(const Job& job, int64_t row) {
    at[0] = job.x.groups + row * job.groups;
    UNROLL for (int r = 1; r < R; ++r) at[r] = now(at[r - 1] + job.groups);
  }
  void keep() {
    UNROLL for (int r = 0; r < R; ++r) at[r] = now(at[r]);
  }
  void next() {
    UNROLL for (int r = 0; r < R; ++r) ++at[r];
  }
  const Activations::Group& operator[](int r) const { return *at[r]; }

  const Activations::Group* at[R];
};

// A format's `accumulate<T, R>` adds x[row..row+R) . w[T tiles from `tile`] to sum[T][R]. `kTiles` x
// `kRows` is the largest pass whose products fit the registers beside the weights: every activation that
// is broadcast feeds all tiles, every weight all rows. `steps` is how often it calls ahead.step(), `kBytes`
// the size of an activation.
template <Format kFormat>
struct FourBit {
  static constexpr int kTiles = kWide ? 2 : 1, kRows = kWide ? 6 : 4, kBytes = 1, kFew = 2;
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
  static void accumulate(const Job& job, int64_t row, int64_t tile, Ahead& ahead, Floats (&sum)[T][R]) {
    const int64_t groups = job.groups, stride = job.stride;
    const uint8_t* data = job.tile(tile);
    GroupRows<R> x(job, row);
    Floats scale_factor[T], minimum_factor[T];
    UNROLL for (int t = 0; t < T; ++t) scale_factor[t] = minimum_factor[t] = zero();
    for (int64_t g = 0; g < groups; ++g, x.next()) {
      x.keep();
      ahead.step();
      if (kSuper && g % 8 == 0) {
        UNROLL for (int t = 0; t < T; ++t) {
          const auto* factors = reinterpret_cast<const uint16_t*>(data + t * stride + Weight::factors_at(g));
          scale_factor[t] = load_half(factors);
          minimum_factor[t] = load_half(factors + 16);
        }
      }
      const Tiles<T> bytes(data + Weight::bytes_at(kFormat, g), stride);
      Partial dot[T][R];
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int t = 0; t < T; ++t) dot[t][r] = kEven ? products_from(&x[r].offset8) : no_products();
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Bytes first[T], second[T];
        UNROLL for (int t = 0; t < T; ++t) {
          const Bytes packed = load_bytes(bytes[t] + 64 * j);
          first[t] = field<0, 4>(packed);
          second[t] = field<4, 4>(packed);
        }
        UNROLL for (int r = 0; r < R; ++r) {
          const int8_t* v = x[r].values + 4 * j;
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
          const Floats factor = mul(factors, set1(x[r].scale));
          const Ints whole = kEven ? products_of(dot[t][r], &x[r].offset8) : widen(dot[t][r]);
          sum[t][r] = fma(to_floats(whole), factor, sum[t][r]);
        }
        if constexpr (!kEven) {
          const Floats added = minimum(data + t * stride, g, minimum_factor[t]);
          UNROLL for (int r = 0; r < R; ++r) {
            sum[t][r] = fma(added, set1(x[r].sum), sum[t][r]);
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
  static void accumulate(const Job& job, int64_t row, int64_t tile, Ahead& ahead, Floats (&sum)[T][R]) {
    const int64_t groups = job.groups, stride = job.stride;
    const uint8_t* data = job.tile(tile);
    GroupRows<R> x(job, row);
    for (int64_t g = 0; g < groups; ++g, x.next()) {
      x.keep();
      ahead.step();
      const Tiles<T> bytes(data + Weight::bytes_at(Format::kFloat4, g), stride);
      Ints whole[T][R];
      UNROLL for (int r = 0; r < R; ++r) {
        const Ints start = set1_int(x[r].offset8 / 8 * kFloat4Offset);  // what the codes' offset adds
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
            const Bytes packed = load_bytes(bytes[t] + 64 * j);
            first[t] = lookup(kFloat4Codes, field<0, 4>(packed));
            second[t] = lookup(kFloat4Codes, field<4, 4>(packed));
          }
          UNROLL for (int r = 0; r < R; ++r) {
            const int8_t* v = x[r].values + 4 * j;
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
          const Floats factor = mul(scale, set1(0.5f * x[r].scale));
          sum[t][r] = fma(to_floats(whole[t][r]), factor, sum[t][r]);
        }
      }
    }
  }
};

struct EightBit {
  static constexpr int kTiles = kWide ? 2 : 1, kRows = kWide ? 6 : 4, kBytes = 1, kFew = kWide ? 3 : 2;

  static int64_t steps(const Weight& w) { return w.groups(); }

  template <int T, int R>
  static void accumulate(const Job& job, int64_t row, int64_t tile, Ahead& ahead, Floats (&sum)[T][R]) {
    const int64_t groups = job.groups, stride = job.stride;
    const uint8_t* data = job.tile(tile);
    GroupRows<R> x(job, row);
    for (int64_t g = 0; g < groups; ++g, x.next()) {
      x.keep();
      ahead.step();
      const Tiles<T> bytes(data + Weight::bytes_at(Format::kQ8, g), stride);
      Ints dot[T][R];
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int t = 0; t < T; ++t) dot[t][r] = start_signed(&x[r].offset128);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        Signed packed[T];
        UNROLL for (int t = 0; t < T; ++t) packed[t] = load_signed(bytes[t] + 64 * j);
        UNROLL for (int r = 0; r < R; ++r) {
          const Bytes v = broadcast4(x[r].values + 4 * j);
          UNROLL for (int t = 0; t < T; ++t) dot[t][r] = dot_signed(dot[t][r], packed[t], v);
        }
      }
      UNROLL for (int t = 0; t < T; ++t) {
        const uint8_t* scales = data + Weight::scales_at(Format::kQ8, g) + t * stride;
        const Floats scale = load_half(reinterpret_cast<const uint16_t*>(scales));
        UNROLL for (int r = 0; r < R; ++r) {
          const Floats factor = mul(scale, set1(x[r].scale));
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
  static void accumulate(const Job& job, int64_t row, int64_t tile, Ahead& ahead, Floats (&sum)[T][R]) {
    const Activations& x = job.x;
    const int64_t chunks = job.w.chunks(), stride = job.stride;
    const int64_t width = Activations::row_stride(job.w.columns);
    const uint8_t* data = job.tile(tile);
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
  static constexpr int kTiles = kWide ? 2 : 1, kRows = kWide ? 6 : 4, kFew = kWide ? 5 : 3;
  static constexpr int kBytes = sizeof(PairValue);

  static int64_t steps(const Weight& w) { return w.columns / 2; }

  template <int T, int R>
  static void accumulate(const Job& job, int64_t row, int64_t tile, Ahead& ahead, Floats (&sum)[T][R]) {
    const int64_t width = job.w.columns, stride = job.stride;
    const uint8_t* data = job.tile(tile);
    const void* rows = kBytes == 2 ? static_cast<const void*>(job.x.bf16) : job.x.floats;
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
  static void accumulate(const Job& job, int64_t row, int64_t tile, Ahead& ahead, Floats (&sum)[T][R]) {
    const int64_t width = job.w.columns, stride = job.stride;
    const uint8_t* data = job.tile(tile);
    const float* values = job.x.floats + row * width;
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

// Stores what has a bias or ends within a tile. Apart, since most passes do without, and the fewer instructions
// there are between the products of two passes, the more of them hide behind products.
template <int T, int R>
__attribute__((noinline)) void finish(const Job& job, Floats (&sum)[T][R], int64_t out, float* y) {
  const int64_t outputs = job.w.rows;
  for (int t = 0; t < T; ++t, out += kTile, y += kTile) {
    const int64_t valid = outputs - out;
    for (int r = 0; r < R; ++r) {
      if (job.bias) sum[t][r] = add(sum[t][r], load(job.bias + out, valid));
      store(y + r * outputs, sum[t][r], valid);
    }
  }
}

template <class F, int T, int R>
void pass(const Job& job, int64_t row, int64_t tile, Ahead& ahead) {
  Floats sum[T][R];
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int r = 0; r < R; ++r) sum[t][r] = zero();
  }
  F::template accumulate<T, R>(job, row, tile, ahead, sum);
  const int64_t outputs = job.w.rows, out = tile * kTile;
  float* y = job.y + row * outputs + out;
  if (job.bias || outputs - out < T * kTile) {
    Floats results[T][R];  // a copy, else the sums themselves would lie in memory
    UNROLL for (int t = 0; t < T; ++t) {
      UNROLL for (int r = 0; r < R; ++r) results[t][r] = sum[t][r];
    }
    return finish<T, R>(job, results, out, y);
  }
  UNROLL for (int r = 0; r < R; ++r, y += outputs) {
    UNROLL for (int t = 0; t < T; ++t) store(y + t * kTile, sum[t][r]);
  }
}

using Pass = void (*)(const Job&, int64_t row, int64_t tile, Ahead&);

// Of `count` rows, 1 to R.
template <class F, int T, int R>
Pass pass_of(int64_t count) {
  if constexpr (R > 1) {
    if (count < R) return pass_of<F, T, R - 1>(count);
  }
  return pass<F, T, R>;
}

// Up to `kFew` rows, a measured crossover: a tile at a time is one sequential read, which the hardware
// fetches best by itself.
template <class F>
void multiply_few(const Job& job, int64_t row, int64_t rows, int64_t first, int64_t last) {
  const Pass one = pass_of<F, 1, F::kFew>(rows);
  Ahead nothing;
  nothing.begin(job.w.data, job.w.data + job.w.bytes, 0);
  for (int64_t tile = first; tile < last; ++tile) one(job, row, tile, nothing);
}

// Rows [row, row + rows) of tiles [first, last). With `fetch` the next tiles are fetched meanwhile, in the end
// those of `then`.
template <class F>
void multiply_block(const Job& job, int64_t row, int64_t rows, int64_t first, int64_t last, bool fetch,
                    const Soon::Piece& then, Ahead& ahead) {
  // Passes of nearly equal size: 8 rows are 4 + 4, not 6 + 2. The first `longer` have a row more.
  const int64_t passes = (rows + F::kRows - 1) / F::kRows, count = rows / passes, longer = rows % passes;
  const int64_t share = fetch ? (F::kTiles * job.stride / 64 + passes - 1) / passes * 64 : 0;
  const int64_t steps = F::steps(job.w), lines = (share / 64 + steps - 1) / steps;
  const auto sized = [](int64_t tiles, int64_t size) {
    return tiles >= F::kTiles ? pass_of<F, F::kTiles, F::kRows>(size) : pass_of<F, 1, F::kRows>(size);
  };
  Pass long_pass = sized(F::kTiles, count + 1), short_pass = sized(F::kTiles, count);
  for (int64_t tile = first; tile < last; tile += F::kTiles) {
    const bool leaves = then.begin && tile + F::kTiles >= last;
    const uint8_t* next = leaves ? then.begin : job.tile(tile + F::kTiles);
    const uint8_t* end = leaves ? then.end : job.w.data + job.w.bytes;
    if (last - tile < F::kTiles) long_pass = sized(1, count + 1), short_pass = sized(1, count);
    for (int64_t n = 0, at = row; n < passes; ++n, next += share) {
      ahead.begin(next, next + share < end ? next + share : end, lines);
      (n < longer ? long_pass : short_pass)(job, at, tile, ahead);
      at += count + (n < longer);
    }
  }
}

// Activations of a block of rows stay in the second-level cache while all tiles go by.
constexpr int64_t kBlockBytes = 192 << 10;

template <class F>
void multiply(const Job& job, int64_t row, int64_t rows, int64_t first, int64_t last, const Soon& soon) {
  if (rows <= F::kFew) return multiply_few<F>(job, row, rows, first, last);
  const int64_t fitting = most(kBlockBytes / (job.w.columns * F::kBytes), 4 * F::kRows);
  const int64_t blocks = (rows + fitting - 1) / fitting;
  const int64_t passes = (rows + F::kRows - 1) / F::kRows;
  Ahead ahead(soon, F::steps(job.w) * passes * ((last - first + F::kTiles - 1) / F::kTiles));
  for (int64_t n = 0, done = 0; n < blocks; ++n) {
    const int64_t count = (rows - done + blocks - n - 1) / (blocks - n);
    multiply_block<F>(job, row + done, count, first, last, n == 0, soon.tiles, ahead);
    done += count;
  }
}

}  // namespace

void matmul(const Weight& w, const Activations& x, int64_t row, int64_t rows, const float* bias,
            float* y, int64_t first, int64_t last, const Soon& soon) {
  const Job job(w, x, bias, y);
  switch (w.format) {
    case Format::kF32: return multiply<Float>(job, row, rows, first, last, soon);
    case Format::kBf16: return multiply<Bf16>(job, row, rows, first, last, soon);
    case Format::kQ8: return multiply<EightBit>(job, row, rows, first, last, soon);
    case Format::kQ4: return multiply<FourBit<Format::kQ4>>(job, row, rows, first, last, soon);
    case Format::kQ4Super: return multiply<FourBit<Format::kQ4Super>>(job, row, rows, first, last, soon);
    case Format::kQ4Even: return multiply<FourBit<Format::kQ4Even>>(job, row, rows, first, last, soon);
    case Format::kFloat4: return multiply<Float4>(job, row, rows, first, last, soon);
    case Format::kTernary: return multiply<Ternary>(job, row, rows, first, last, soon);
  }
}

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
