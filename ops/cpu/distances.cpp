// Squared Euclidean distances of a few points by their differences, without the loss of digits that |x|^2 + |c|^2 - 2xc
// has for neighbors: many features for a few points, a few features (coordinates) for many points. Plain C interface for
// ctypes; ops/centers/distances.py holds the PyTorch path.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int TILE = 4;  // TILE x TILE sums, TILE keys and two more stay in registers
#elif defined(__AVX__)
constexpr int TILE = 3;
#else
constexpr int TILE = 2;
#endif

// ROWS queries x COLS keys of D numbers: out[r * stride + c].
template <int ROWS, int COLS>
void tile(const float* queries, const float* keys, int64_t D, float* out, int64_t stride) {
  vf sums[ROWS][COLS] = {};
  int64_t d = 0;
  for (; d + VL <= D; d += VL) {
    vf key[COLS];
    for (int c = 0; c < COLS; ++c) key[c] = load(keys + c * D + d);
    for (int r = 0; r < ROWS; ++r) {
      const vf query = load(queries + r * D + d);
      for (int c = 0; c < COLS; ++c) {
        const vf t = query - key[c];
        sums[r][c] += t * t;
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) {
      float s = 0;
      for (int64_t e = d; e < D; ++e) {
        const float t = queries[r * D + e] - keys[c * D + e];
        s += t * t;
      }
      for (int lane = 0; lane < VL; ++lane) s += sums[r][c][lane];
      out[r * stride + c] = s;
    }
}

template <int ROWS>
void band(const float* queries, const float* keys, int64_t N, int64_t D, float* out, int64_t stride) {
  int64_t n = 0;
  for (; n + TILE <= N; n += TILE) tile<ROWS, TILE>(queries, keys + n * D, D, out + n, stride);
  for (; n < N; ++n) tile<ROWS, 1>(queries, keys + n * D, D, out + n, stride);
}

// Few features: one vector of keys after the other, feature by feature, from a transposed copy of some keys.
constexpr int64_t FEW = 16, STRETCH = 256, ROWS = 4 * TILE;

void few_features(const float* queries, const float* keys, int64_t B, int64_t N, int64_t D, float* out) {
  float columns[FEW * STRETCH] = {};
  for (int64_t first = 0; first < N; first += STRETCH) {
    const int64_t count = std::min(STRETCH, N - first);
    for (int64_t n = 0; n < count; ++n)
      for (int64_t d = 0; d < D; ++d) columns[d * STRETCH + n] = keys[(first + n) * D + d];
    for (int64_t b = 0; b < B; ++b) {
      const float* query = queries + b * D;
      float* row = out + b * N + first;
      for (int64_t n = 0; n < count; n += VL) {
        vf sum = {};
        for (int64_t d = 0; d < D; ++d) {
          const vf t = query[d] - load(columns + d * STRETCH + n);
          sum += t * t;
        }
        if (n + VL <= count)
          store(row + n, sum);
        else
          for (int64_t lane = 0; n + lane < count; ++lane) row[n + lane] = sum[lane];
      }
    }
  }
}

void squared(const float* queries, const float* keys, int64_t B, int64_t N, int64_t D, float* out) {
  if (D <= FEW) {
    few_features(queries, keys, B, N, D, out);
    return;
  }
  int64_t b = 0;
  for (; b + TILE <= B; b += TILE) band<TILE>(queries + b * D, keys, N, D, out + b * N, N);
  for (; b < B; ++b) band<1>(queries + b * D, keys, N, D, out + b * N, N);
}

// work(first, count) for all rows in pieces, on several threads if there is enough to do.
template <class Work>
int in_pieces(int threads, int64_t rows, int64_t differences, Work&& work) {
  if (differences < (1 << 19)) threads = 1;
  const int64_t share = std::max<int64_t>(1, ceil_div(rows, 2 * threads));
  const int64_t size = std::min<int64_t>(8, ceil_div(share, ROWS)) * ROWS;
  return guarded([&] {
    run_tasks(threads, ceil_div(rows, size), [&](int64_t task) {
      work(task * size, std::min(size, rows - task * size));
    });
  });
}

// Squared distances -> (distance + epsilon)^-(2^SQUARINGS), in place.
template <int SQUARINGS>
void weigh(float* values, int64_t count, float epsilon) {
  for (int64_t i = 0; i < count; ++i) {
    float w = std::sqrt(values[i]) + epsilon;
    for (int s = 0; s < SQUARINGS; ++s) w *= w;
    values[i] = 1 / w;
  }
}

// Adds the votes of some keys to the sums of a few queries; columns are those of the keys, transposed to (V, STRETCH).
void vote(const float* queries, const float* keys, const float* columns, int64_t rows, int64_t count, int64_t D,
          int64_t V, float epsilon, int squarings, float* sums) {
  float weights[ROWS * STRETCH];
  squared(queries, keys, rows, count, D, weights);
  switch (squarings) {
    case 0: weigh<0>(weights, rows * count, epsilon); break;
    case 1: weigh<1>(weights, rows * count, epsilon); break;
    case 2: weigh<2>(weights, rows * count, epsilon); break;
    default: weigh<3>(weights, rows * count, epsilon);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* weight = weights + r * count;
    for (int64_t v = 0; v < V; ++v) {
      const float* column = columns + v * STRETCH;
      vf total = {};
      int64_t n = 0;
      for (; n + VL <= count; n += VL)
        total += load(weight + n) * load(column + n);
      float sum = 0;
      for (; n < count; ++n) sum += weight[n] * column[n];
      for (int lane = 0; lane < VL; ++lane) sum += total[lane];
      sums[r * V + v] += sum;
    }
  }
}

}  // namespace

extern "C" {

// queries (B, D), keys (N, D) -> out (B, N), all float32 and contiguous.
int nd_squared(const float* queries, const float* keys, int64_t B, int64_t N, int64_t D, float* out, int threads) {
  return in_pieces(threads, B, B * N * D, [&](int64_t first, int64_t count) {
    squared(queries + first * D, keys, count, N, D, out + first * N);
  });
}

// Adds the votes of all keys to sums (B, V): columns (N, V) weighted by (distance + epsilon)^-(2^squarings).
int nd_votes(const float* queries, const float* keys, const float* columns, int64_t B, int64_t N, int64_t D, int64_t V,
             float epsilon, int squarings, float* sums, int threads) {
  return in_pieces(threads, B, B * N * D, [&](int64_t first, int64_t size) {
    std::vector<float> transposed(V * STRETCH);
    for (int64_t key = 0; key < N; key += STRETCH) {
      const int64_t count = std::min(STRETCH, N - key);
      for (int64_t n = 0; n < count; ++n)
        for (int64_t v = 0; v < V; ++v) transposed[v * STRETCH + n] = columns[(key + n) * V + v];
      for (int64_t b = first; b < first + size; b += ROWS)
        vote(queries + b * D, keys + key * D, transposed.data(), std::min(ROWS, first + size - b), count, D, V, epsilon,
             squarings, sums + b * V);
    }
  });
}

}  // extern "C"
