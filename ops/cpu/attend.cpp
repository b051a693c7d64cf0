// Attention over chosen neighbors and its gradient, for float32 tensors on a CPU: ops/maps/attend.py.
//
// Plain C entry points; every function works on contiguous row-major arrays of the caller. Symbols: B batch, M queries,
// N keys, C channels, K neighbors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

// Scores are dot products, or minus squared distances; cosine comes as the dot product of unit rows.
struct Attend {
  const float *q, *k, *v;  // (B, N, C), (B, M, C), (B, N, C)
  const int64_t* indices;
  int64_t index_step, B, M, N, C, K;
  int euclidean, fixed;    // fixed: the first score is self_score
  float self_score;
  const float* keep;       // factors of dropout (B, M, K), or null
  const float* weight;     // (K, C)
  int threads;

  bool valid() const { return in_range(indices, (index_step ? B : 1) * M * K, N); }
  const int64_t* taps(int64_t b, int64_t m) const { return indices + b * index_step + m * K; }

  static float square_distance(const float* a, const float* b, int64_t n) {
    vf acc = {};
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
      const vf d = load(a + i) - load(b + i);
      acc += d * d;
    }
    float sum = 0;
    for (int l = 0; l < VL; ++l) sum += acc[l];
    for (; i < n; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
  }

  // attention (B, M, K) before dropout, y (B, M, C)
  void forward(const float* bias, float* attention, float* y) const {
    const int64_t step = 64, tasks = ceil_div(M, step);
    run_tasks(threads, B * tasks, [&](int64_t task) {
      const int64_t b = task / tasks, m0 = task % tasks * step;
      for (int64_t m = m0; m < std::min(M, m0 + step); ++m) {
        const int64_t* at = taps(b, m);
        float* a = attention + (b * M + m) * K;
        const float* row = k + (b * M + m) * C;
        float most = -INF, sum = 0;
        for (int64_t j = 0; j < K; ++j) {
          const float* other = q + (b * N + at[j]) * C;
          a[j] = fixed && j == 0 ? self_score : euclidean ? -square_distance(row, other, C) : dot(row, other, C);
          most = std::max(most, a[j]);
        }
        for (int64_t j = 0; j < K; ++j) sum += a[j] = std::exp(a[j] - most);
        float* to = y + (b * M + m) * C;
        if (bias) std::memcpy(to, bias, C * 4);
        else std::memset(to, 0, C * 4);
        for (int64_t j = 0; j < K; ++j) {
          a[j] /= sum;
          const float share = keep ? a[j] * keep[(b * M + m) * K + j] : a[j];
          const float *from = v + (b * N + at[j]) * C, *w = weight + j * C;
          for (int64_t c = 0; c < C; ++c) to[c] += share * w[c] * from[c];
        }
      }
    });
  }

  // Samples are summed by one thread each, and the weight's parts in order: one fixed order of sums.
  void backward(const float* gy, const float* attention, float* gq, float* gk, float* gv, float* gw) const {
    const int parts = static_cast<int>(std::min<int64_t>(threads, B));
    Buffer sums;
    sums.get(static_cast<size_t>(parts) * K * C);
    run_tasks(threads, parts, [&](int64_t part) {
      float* sum = sums.data + static_cast<size_t>(part) * K * C;
      std::memset(sum, 0, K * C * 4);
      std::vector<float> ga(K);
      for (int64_t b = B * part / parts; b < B * (part + 1) / parts; ++b)
        for (int64_t m = 0; m < M; ++m) {
          const int64_t at = (b * M + m);
          const float* g = gy + at * C;
          float mean = 0;
          for (int64_t j = 0; j < K; ++j) {
            const float a = attention[at * K + j], factor = keep ? keep[at * K + j] : 1.f;
            const int64_t place = (b * N + taps(b, m)[j]) * C;
            ga[j] = factor * value_row(g, v + place, weight + j * C, a * factor, gv + place, sum + j * C);
            mean += a * ga[j];
          }
          const float* row = k + at * C;
          float* g_row = gk + at * C;
          std::memset(g_row, 0, C * 4);
          for (int64_t j = fixed; j < K; ++j) {
            const float gs = attention[at * K + j] * (ga[j] - mean);
            const int64_t place = (b * N + taps(b, m)[j]) * C;
            score_row(gs, row, q + place, g_row, gq + place);
          }
        }
    });
    for (int64_t i = 0; i < K * C; ++i) {
      gw[i] = 0;
      for (int part = 0; part < parts; ++part) gw[i] += sums.data[static_cast<size_t>(part) * K * C + i];
    }
  }

  // Returns Σ_c g w v; adds g w share to gv and g v share to gw.
  float value_row(const float* g, const float* v, const float* w, float share, float* gv, float* gw) const {
    vf acc = {};
    int64_t c = 0;
    for (; c + VL <= C; c += VL) {
      const vf gc = load(g + c), vc = load(v + c), wc = load(w + c);
      acc += gc * wc * vc;
      store(gv + c, load(gv + c) + gc * wc * share);
      store(gw + c, load(gw + c) + gc * vc * share);
    }
    float sum = 0;
    for (int l = 0; l < VL; ++l) sum += acc[l];
    for (; c < C; ++c) {
      sum += g[c] * w[c] * v[c];
      gv[c] += g[c] * w[c] * share;
      gw[c] += g[c] * v[c] * share;
    }
    return sum;
  }

  void score_row(float gs, const float* __restrict row, const float* __restrict other, float* __restrict g_row,
                 float* __restrict g_other) const {
    if (euclidean) {
      for (int64_t c = 0; c < C; ++c) {
        const float d = 2 * gs * (row[c] - other[c]);
        g_row[c] -= d;
        g_other[c] += d;
      }
    } else {
      for (int64_t c = 0; c < C; ++c) {
        g_row[c] += gs * other[c];
        g_other[c] += gs * row[c];
      }
    }
  }
};

}  // namespace

extern "C" {

// See attend_neighbors. weight (K, C); keep and bias may be null.
int nn_attend(const float* q, const float* k, const float* v, const int64_t* indices, int64_t index_step,
              const float* weight, const float* bias, const float* keep, int euclidean, int fixed, float self_score,
              float* attention, float* y, int64_t B, int64_t M, int64_t N, int64_t C, int64_t K, int threads) {
  const Attend a{q, k, v, indices, index_step, B, M, N, C, K, euclidean, fixed, self_score, keep, weight, threads};
  if (!a.valid()) return BAD_INDEX;
  return guarded([&] { a.forward(bias, attention, y); });
}

// gq and gv must be zero; gk and gw (K, C) are overwritten.
int nn_attend_backward(const float* gy, const float* attention, const float* q, const float* k, const float* v,
                       const int64_t* indices, int64_t index_step, const float* weight, const float* keep,
                       int euclidean, int fixed, float* gq, float* gk, float* gv, float* gw, int64_t B, int64_t M,
                       int64_t N, int64_t C, int64_t K, int threads) {
  const Attend a{q, k, v, indices, index_step, B, M, N, C, K, euclidean, fixed, 0.f, keep, weight, threads};
  if (!a.valid()) return BAD_INDEX;
  return guarded([&] { a.backward(gy, attention, gq, gk, gv, gw); });
}

}  // extern "C"
