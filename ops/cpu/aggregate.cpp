// Weighted sums over chosen neighbors and their gradients, for float32 tensors on a CPU: ops/maps/aggregate.py.
//
// Plain C entry points; every function works on contiguous row-major arrays of the caller. Symbols: B batch, M queries,
// N keys, C channels, K neighbors, O outputs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

// Matrix products are register tiles of MR rows by NV vectors; sums of outer products are at most MAX_HEIGHT rows high.
#if defined(__AVX512F__)
constexpr int MR = 12;
constexpr int64_t MAX_HEIGHT = 13;
#elif defined(__AVX__)
constexpr int MR = 6;
constexpr int64_t MAX_HEIGHT = 6;
#else
constexpr int MR = 4;
constexpr int64_t MAX_HEIGHT = 4;
#endif

// acc(H, width) += rows · b, rows given by pointers, b packed (C, NW * VL).
template <int H, int NW>
inline void row_product(const float* const* rows, const float* __restrict b, int C, vf (&acc)[H][NW]) {
  const float* r[H];
  UNROLL for (int i = 0; i < H; ++i) r[i] = rows[i];
  for (int64_t c = 0; c < C; ++c, b += NW * VL) {
    vf y[NW];
    UNROLL for (int j = 0; j < NW; ++j) y[j] = load(b + j * VL);
    UNROLL for (int i = 0; i < H; ++i) {
      const vf x = splat(r[i][c]);
      UNROLL for (int j = 0; j < NW; ++j) acc[i][j] += x * y[j];
    }
  }
}

inline void store_some(float* p, const vf* v, int width) {
  alignas(64) float tmp[NR];
  for (int j = 0; j * VL < width; ++j) store(tmp + j * VL, v[j]);
  std::memcpy(p, tmp, width * 4);
}

// Matrices src[k] (rows, width) as panels of NR columns (the last one of VL where that is enough), zero-filled; a
// panel holds its columns of src[0], src[1], ... one after the other. Element (k, r, c) is src[k sk + r sr + c sc].
struct Panels {
  int64_t K, rows;
  int width, count;
  Buffer buffer;
  Panels(const float* src, int64_t K, int64_t sk, int64_t rows, int64_t sr, int width, int64_t sc)
      : K(K), rows(rows), width(width), count(static_cast<int>(ceil_div(width, NR))) {
    buffer.get(static_cast<size_t>(K * rows) * count * NR);
    for (int p = 0; p < count; ++p) {
      const int cols = columns(p), padded = vectors(p) * VL;
      float* to = buffer.data + p * K * rows * NR;
      for (int64_t k = 0; k < K; ++k)
        for (int64_t r = 0; r < rows; ++r, to += padded) {
          const float* from = src + k * sk + r * sr + static_cast<int64_t>(p) * NR * sc;
          for (int c = 0; c < padded; ++c) to[c] = c < cols ? from[c * sc] : 0.f;
        }
    }
  }
  int columns(int p) const { return std::min(NR, width - p * NR); }
  int vectors(int p) const { return columns(p) > VL ? NV : 1; }
  const float* panel(int p, int64_t k = 0) const {
    return buffer.data + p * K * rows * NR + k * rows * vectors(p) * VL;
  }
};

struct Aggregate {
  const float* x;          // (B, N, C)
  const int64_t* indices;  // (B, M, K), or (M, K) with index_step 0
  int64_t index_step, B, M, N, C, O, K;
  int threads;

  bool valid() const { return in_range(indices, (index_step ? B : 1) * M * K, N); }
  const int64_t* taps(int64_t b, int64_t m) const { return indices + b * index_step + m * K; }

  template <int NW>
  void forward_panel(int64_t b, int64_t m0, int64_t rows, const Panels& w, int p, const float* bias, float* y,
                     float* gathered) const {
    const int cols = w.columns(p);
    alignas(64) float start[NR] = {};
    if (bias) std::memcpy(start, bias + p * NR, cols * 4);
    for (int64_t r0 = 0; r0 < rows; r0 += MR) {
      vf acc[MR][NW];
      UNROLL for (int i = 0; i < MR; ++i) {
        UNROLL for (int j = 0; j < NW; ++j) acc[i][j] = load(start + j * VL);
      }
      const float* from[MR];
      if (gathered) {
        for (int i = 0; i < MR; ++i) from[i] = gathered + std::min<int64_t>(r0 + i, rows - 1) * K * C;
        row_product<MR, NW>(from, w.panel(p), static_cast<int>(K * C), acc);
      } else {
        for (int64_t k = 0; k < K; ++k) {
          for (int i = 0; i < MR; ++i)
            from[i] = x + (b * N + taps(b, m0 + std::min<int64_t>(r0 + i, rows - 1))[k]) * C;
          row_product<MR, NW>(from, w.panel(p, k), static_cast<int>(C), acc);
        }
      }
      for (int i = 0; i < std::min<int64_t>(MR, rows - r0); ++i) {
        float* to = y + (b * M + m0 + r0 + i) * O + p * NR;
        if (cols == NW * VL) {
          UNROLL for (int j = 0; j < NW; ++j) store(to + j * VL, acc[i][j]);
        } else {
          store_some(to, acc[i], cols);
        }
      }
    }
  }

  void gather(int64_t b, int64_t m0, int64_t rows, int64_t ld, float* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t* at = taps(b, m0 + r);
      float* row = to + r * ld;
      for (int64_t k = 0; k < K; ++k) std::memcpy(row + k * C, x + (b * N + at[k]) * C, C * 4);
      for (int64_t c = K * C; c < ld; ++c) row[c] = 0;
    }
  }

  void forward(const float* weight, const float* bias, float* y) const {
    const Panels w(weight, K, 1, C, K, static_cast<int>(O), C * K);
    const int64_t step = MR * 12, tasks = ceil_div(M, step);
    run_tasks(threads, B * tasks, [] { return Buffer(); }, [&](int64_t task, Buffer& scratch) {
      const int64_t b = task / tasks, m0 = task % tasks * step, rows = std::min(step, M - m0);
      float* gathered = nullptr;
      if (C < 16) gather(b, m0, rows, K * C, gathered = scratch.get(rows * K * C));
      for (int p = 0; p < w.count; ++p) {
        if (w.vectors(p) == NV) forward_panel<NV>(b, m0, rows, w, p, bias, y, gathered);
        else forward_panel<1>(b, m0, rows, w, p, bias, y, gathered);
      }
    });
  }

  template <int NW>
  void input_panel(int64_t b, const Panels& w, int p, const float* gy, float* gx) const {
    const int cols = w.columns(p);
    for (int64_t m0 = 0; m0 < M; m0 += MR) {
      const int rows = static_cast<int>(std::min<int64_t>(MR, M - m0));
      const float* from[MR];
      for (int i = 0; i < MR; ++i) from[i] = gy + (b * M + m0 + std::min(i, rows - 1)) * O;
      for (int64_t k = 0; k < K; ++k) {
        vf acc[MR][NW];
        UNROLL for (int i = 0; i < MR; ++i) {
          UNROLL for (int j = 0; j < NW; ++j) acc[i][j] = vf{};
        }
        row_product<MR, NW>(from, w.panel(p, k), static_cast<int>(O), acc);
        UNROLL for (int i = 0; i < MR; ++i) {
          if (i < rows) {
            float* to = gx + (b * N + taps(b, m0 + i)[k]) * C + p * NR;
            if (cols == NW * VL) {
              UNROLL for (int j = 0; j < NW; ++j) store(to + j * VL, load(to + j * VL) + acc[i][j]);
            } else {
              alignas(64) float sum[NW * VL];
              UNROLL for (int j = 0; j < NW; ++j) store(sum + j * VL, acc[i][j]);
              for (int c = 0; c < cols; ++c) to[c] += sum[c];
            }
          }
        }
      }
    }
  }

  // gx must be zero. Threads share out samples, or columns where samples are few, so sums have one fixed order.
  void grad_input(const float* weight, const float* gy, float* gx) const {
    const Panels w(weight, K, 1, O, C * K, static_cast<int>(C), K);
    const int64_t splits = B < 2 * threads ? w.count : 1;
    run_tasks(threads, B * splits, [&](int64_t task) {
      const int64_t b = task / splits;
      const int first = splits > 1 ? static_cast<int>(task % splits) : 0;
      for (int p = first; p < (splits > 1 ? first + 1 : w.count); ++p) {
        if (w.vectors(p) == NV) input_panel<NV>(b, w, p, gy, gx);
        else input_panel<1>(b, w, p, gy, gx);
      }
    });
  }

  // sum(H, NW vectors) += Σ_r g[r, :H]ᵀ rows[r][:NW vectors]
  template <int H, int NW>
  static void outer_tile(const float* g, int64_t ld, const float* const* rows, int64_t column, int64_t count,
                         float* sum, int64_t sum_ld) {
    vf acc[H][NW];
    UNROLL for (int i = 0; i < H; ++i) {
      UNROLL for (int j = 0; j < NW; ++j) acc[i][j] = load(sum + i * sum_ld + j * VL);
    }
    for (int64_t r = 0; r < count; ++r, g += ld) {
      const float* row = rows[r] + column;
      vf y[NW];
      UNROLL for (int j = 0; j < NW; ++j) y[j] = load(row + j * VL);
      UNROLL for (int i = 0; i < H; ++i) {
        const vf v = splat(g[i]);
        UNROLL for (int j = 0; j < NW; ++j) acc[i][j] += v * y[j];
      }
    }
    UNROLL for (int i = 0; i < H; ++i) {
      UNROLL for (int j = 0; j < NW; ++j) store(sum + i * sum_ld + j * VL, acc[i][j]);
    }
  }

  template <int NW>
  static void outer(int height, const float* g, int64_t ld, const float* const* rows, int64_t column, int64_t count,
                    float* sum, int64_t sum_ld) {
    switch (height) {
#define TILE(H) \
  case H: return outer_tile<H, NW>(g, ld, rows, column, count, sum, sum_ld);
      TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if defined(__AVX512F__)
      TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13)
#endif
#undef TILE
    }
  }

  // Rows are split into as many fixed parts as there are threads, summed in order at the end.
  void grad_weight(const float* gy, float* gw) const {
    const bool copy = C % VL != 0;  // rows that do not fill whole vectors are gathered first
    const int64_t width = copy ? ceil_div(K * C, VL) * VL : C, taps_apart = copy ? 1 : K;
    const int64_t heights = ceil_div(O, MAX_HEIGHT), height = ceil_div(O, heights);
    const int64_t step = 512, total = B * M, units = ceil_div(total, step);
    const int parts = static_cast<int>(std::min<int64_t>(threads, units));
    const int64_t size = taps_apart * O * width;
    Buffer sums;
    sums.get(parts * size);
    run_tasks(threads, parts, [&](int64_t part) {
      float* sum = sums.data + part * size;
      std::memset(sum, 0, size * 4);
      Buffer gathered;
      std::vector<const float*> rows(taps_apart * step);
      for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
        const int64_t r0 = unit * step, count = std::min(step, total - r0);
        if (copy) {
          float* to = gathered.get(step * width);
          for (int64_t r = 0; r < count; ++r) {
            gather((r0 + r) / M, (r0 + r) % M, 1, width, to + r * width);
            rows[r] = to + r * width;
          }
        } else {
          for (int64_t r = 0; r < count; ++r) {
            const int64_t b = (r0 + r) / M;
            const int64_t* at = taps(b, (r0 + r) % M);
            for (int64_t k = 0; k < K; ++k) rows[k * step + r] = x + (b * N + at[k]) * C;
          }
        }
        for (int64_t k = 0; k < taps_apart; ++k)
          for (int64_t c = 0; c < width; c += NR)
            for (int64_t o = 0; o < O; o += height) {
              const int high = static_cast<int>(std::min(height, O - o));
              float* to = sum + (k * O + o) * width + c;
              if (width - c >= NR) outer<NV>(high, gy + r0 * O + o, O, &rows[k * step], c, count, to, width);
              else outer<1>(high, gy + r0 * O + o, O, &rows[k * step], c, count, to, width);
            }
      }
    });
    for (int64_t o = 0; o < O; ++o)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t k = 0; k < K; ++k) {
          const int64_t at = copy ? o * width + k * C + c : (k * O + o) * width + c;
          float sum = 0;
          for (int part = 0; part < parts; ++part) sum += sums.data[part * size + at];
          gw[(o * C + c) * K + k] = sum;
        }
  }
};

}  // namespace

extern "C" {

// See aggregate_neighbors. weight (O, C, K); bias may be null.
int nn_aggregate(const float* x, const int64_t* indices, int64_t index_step, const float* weight, const float* bias,
                 float* y, int64_t B, int64_t M, int64_t N, int64_t C, int64_t O, int64_t K, int threads) {
  const Aggregate a{x, indices, index_step, B, M, N, C, O, K, threads};
  if (!a.valid()) return BAD_INDEX;
  return guarded([&] { a.forward(weight, bias, y); });
}

int nn_aggregate_grad_input(const float* gy, const int64_t* indices, int64_t index_step, const float* weight,
                            float* gx, int64_t B, int64_t M, int64_t N, int64_t C, int64_t O, int64_t K,
                            int threads) {
  const Aggregate a{nullptr, indices, index_step, B, M, N, C, O, K, threads};
  if (!a.valid()) return BAD_INDEX;
  return guarded([&] { a.grad_input(weight, gy, gx); });
}

int nn_aggregate_grad_weight(const float* gy, const float* x, const int64_t* indices, int64_t index_step, float* gw,
                             int64_t B, int64_t M, int64_t N, int64_t C, int64_t O, int64_t K, int threads) {
  const Aggregate a{x, indices, index_step, B, M, N, C, O, K, threads};
  if (!a.valid()) return BAD_INDEX;
  return guarded([&] { a.grad_weight(gy, gw); });
}

}  // extern "C"
