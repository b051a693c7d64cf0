// Keys and queries packed for 8-bit dot products, with bounds on what that loses: what index.cpp scans.
//
// Keys come in panels of 48, four bytes of a key side by side (bytes.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "pairs.h"
#include "vectors.h"

namespace {

constexpr int kMeta = 2 * kPanel + 4;  // scales, biases, largest norm, largest residual, largest |bias|, spare

// One row -> float32, for cosine at length 1, minus `mean`. Returns its norm; `ok` turns false on NaN or overflow.
// The only rounding is that of the result: the row is within kRound * norm of the true one.
constexpr double kRound = 1.3e-7;

template <class T>
double center_row(const T* x, const float* mean, int64_t d, bool normalise, float* out, bool* ok) {
  if (normalise) {
    double n = std::sqrt(squared_norm(x, d));
    if (!(n < 1e150)) *ok = false;
    const double f = n > 0 ? 1.0 / n : 0.0;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] = float(double(x[c]) * f - double(mean[c]));
  } else if (std::is_same<T, float>::value) {
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] = float(x[c]) - mean[c];
  } else {
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] = float(double(x[c]) - double(mean[c]));
  }
  double s = squared_norm(out, d);
  if (!(s < 1e36)) *ok = false;
  return std::sqrt(s);
}

// Symmetric quantisation of a row: values in [-127, 127], returns scale; residual norm (an upper bound) in *resid.
float quantise_row(const float* x, int64_t d, int32_t* out, double* resid) {
  float top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < d; ++c) top = std::max(top, std::fabs(x[c]));
  if (top < 1e-30f) {
    for (int64_t c = 0; c < d; ++c) out[c] = 0;
    *resid = std::sqrt(double(d)) * 1e-30;
    return 0.0f;
  }
  float s = top / 127.0f, inv = 127.0f / top;
  float r = 0;
#pragma omp simd reduction(+ : r)
  for (int64_t c = 0; c < d; ++c) {
    const float p = x[c] * inv, w = std::fabs(p) < 127.0f ? p : std::copysign(127.0f, p);
    const int32_t q = int32_t(w + std::copysign(0.5f, w));  // any rounding will do: its error is measured
    const float v = float(q);
    out[c] = q;
    float t = x[c] - v * s;
    r += t * t;
  }
  // float rounding in t and in the sum: relative d * 2^-24 of the sum, plus 2^-23 * top per entry
  *resid = std::sqrt(double(r)) * (1.0 + 1e-7 * double(d)) + std::sqrt(double(d)) * 2.4e-7 * top;
  return s;
}

// ---- keys ---------------------------------------------------------------------------------------------------------

// Integer panels: keys as unsigned bytes. bias (int32): euclidean |y|^2 - 256 sum(y) for u8; see es_queries.
void pack_integer_panel(const uint8_t* rows, uint8_t flip, int64_t n, int64_t d, int64_t dpad, int metric, bool u8,
                        uint8_t* out, float* meta) {
  std::memset(out, 0, size_t(dpad) * kPanel);
  int32_t* bias = reinterpret_cast<int32_t*>(meta + kPanel);
  for (int j = 0; j < kPanel; ++j) {
    meta[j] = 1.0f;
    if (j >= n) {
      bias[j] = std::numeric_limits<int32_t>::max();
      continue;
    }
    const uint8_t* y = rows + j * d;
    int32_t sum = 0, sq = 0;
    for (int64_t c = 0; c < d; ++c) {
      int32_t v = uint8_t(y[c] ^ flip);
      sum += v;
      sq += v * v;
      out[(c >> 2) * (kPanel * 4) + j * 4 + (c & 3)] = uint8_t(v);
    }
    if (metric == EUCLIDEAN)
      bias[j] = sq - 256 * sum;  // queries are shifted by -128
    else
      bias[j] = u8 ? -128 * sum : 0;
  }
  meta[2 * kPanel] = meta[2 * kPanel + 1] = meta[2 * kPanel + 2] = 0;
}

// Cosine on bytes: integer dot products, only |y| rounds. Keys unsigned (int8 keys are moved by 128).
template <class T>
void pack_byte_cosine_panel(const T* rows, uint8_t flip, int64_t n, int64_t d, int64_t dpad, uint8_t* out,
                            float* meta) {
  std::memset(out, 0, size_t(dpad) * kPanel);
  double a = 0, r = 0;
  for (int j = 0; j < kPanel; ++j) {
    if (j >= n) {
      meta[j] = 0.0f;
      meta[kPanel + j] = INF;
      continue;
    }
    const T* y = rows + j * d;
    int64_t sum = 0, sq = 0, usq = 0;
    for (int64_t c = 0; c < d; ++c) {
      int64_t v = y[c], u = uint8_t(uint8_t(y[c]) ^ flip);
      sum += u;
      sq += v * v;
      usq += u * u;
      out[(c >> 2) * (kPanel * 4) + j * 4 + (c & 3)] = uint8_t(u);
    }
    double inv = sq > 0 ? 1.0 / std::sqrt(double(sq)) : 0.0;
    meta[j] = float(inv);
    // u8: x.y = acc + 128 sum(y), acc over (x - 128) and y. int8: x.y = acc - 128 sum(x): in the start value.
    double b = std::is_same<T, uint8_t>::value ? -128.0 * double(sum) * inv : 0.0;
    meta[kPanel + j] = float(b);
    a = std::max(a, (std::sqrt(double(usq)) + 1.0) * inv);
    r = std::max(r, std::fabs(b));
  }
  meta[2 * kPanel] = float(a * 1.0001);
  meta[2 * kPanel + 1] = 0.0f;
  meta[2 * kPanel + 2] = float(r * 4.8e-7 + 1e-36);
}

template <class T>
bool pack_float_panel(const T* rows, const float* mean, int64_t n, int64_t d, int64_t dpad, int metric,
                      uint8_t* out, float* meta, float* row, int32_t* q) {
  std::memset(out, 128, size_t(dpad) * kPanel);
  bool ok = true;
  double a = 0, b = 0, r = 0;
  const double mean_norm = std::sqrt(squared_norm(mean, d));
  for (int j = 0; j < kPanel; ++j) {
    if (j >= n) {
      meta[j] = 0.0f;
      meta[kPanel + j] = INF;
      continue;
    }
    const T* y = rows + j * d;
    double norm = center_row(y, mean, d, metric == COSINE, row, &ok), resid;
    float s = quantise_row(row, d, q, &resid);
    int32_t* dst = reinterpret_cast<int32_t*>(out) + j;
    int64_t c = 0;
    for (; c + 4 <= d; c += 4)
      dst[(c >> 2) * kPanel] = int32_t(uint32_t(q[c] + 128) | uint32_t(q[c + 1] + 128) << 8 |
                                       uint32_t(q[c + 2] + 128) << 16 | uint32_t(q[c + 3] + 128) << 24);
    for (; c < d; ++c) out[(c >> 2) * (kPanel * 4) + j * 4 + (c & 3)] = uint8_t(q[c] + 128);
    const double e = kRound * norm;
    double bias = 0, moved;  // moved: how far rounding of the row can move the bias
    if (metric == EUCLIDEAN) {
      bias = norm * norm;
      moved = 2.0 * norm * e + e * e;
    } else {
      for (int64_t f = 0; f < d; ++f) bias -= double(mean[f]) * double(row[f]);
      moved = mean_norm * e;
    }
    meta[j] = s;
    meta[kPanel + j] = float(bias);
    a = std::max(a, norm + resid + e);
    b = std::max(b, resid + e);
    r = std::max(r, std::fabs(bias) * 2.4e-7 + moved);
  }
  meta[2 * kPanel] = float(a * 1.0001);
  meta[2 * kPanel + 1] = float(b * 1.0001);
  meta[2 * kPanel + 2] = float(r * 1.0001 + 1e-36);
  return ok;
}

// ---- queries ------------------------------------------------------------------------------------------------------

struct Search {
  int64_t m, d, dpad, K;
  int metric, type, threads;
  bool integers;          // exact integer costs, nothing to certify
  const void* queries;    // caller's rows, kept alive by the caller
  std::vector<int8_t> packed;      // (m padded to kRows, dpad)
  std::vector<int32_t> start;      // initial accumulator
  std::vector<float> scale;        // c * sx_i
  std::vector<float> err_norm, err_resid, err_add;  // see E above
  std::vector<double> shift;       // const_i
  std::vector<double> norm;        // |x_i| of the caller's rows
  std::vector<double> unit;        // computed costs are this many times the true ones (8-bit cosine: |x_i|)
  std::atomic<int64_t> evaluated{0};  // pairs evaluated in float64
  std::vector<std::vector<Best>> best;  // heaps, worst on top
};

template <class T>
void pack_byte_query(Search& h, int64_t i) {
  const T* x = static_cast<const T*>(h.queries) + i * h.d;
  int8_t* out = h.packed.data() + i * h.dpad;
  const bool u8 = std::is_same<T, uint8_t>::value;
  int64_t sum = 0, sq = 0, shifted = 0;
  for (int64_t c = 0; c < h.d; ++c) {
    const int b = int(x[c]) - (u8 ? 128 : 0);
    out[c] = int8_t(b);
    sum += b;
    shifted += b * b;
    sq += int64_t(x[c]) * int64_t(x[c]);
  }
  h.norm[i] = std::sqrt(double(sq));
  h.scale[i] = 1.0f;
  if (h.metric == EUCLIDEAN) {
    h.shift[i] = double(shifted + 256 * sum + h.d * 16384);  // sum of (b + 128)^2: both sides moved into 0..255
  } else if (h.integers) {
    h.shift[i] = u8 ? 0.0 : 128.0 * double(sum);
  } else {
    if (!u8) h.start[i] = int32_t(-128 * sum);
    h.unit[i] = h.norm[i];
    h.err_norm[i] = round_up((std::sqrt(double(shifted)) + (u8 ? 0.0 : 128.0 * std::fabs(double(sum)))) * 4.9e-7);
  }
}

template <class T>
bool pack_float_query(Search& h, int64_t i, const float* mean, float* row, int32_t* q) {
  const T* x = static_cast<const T*>(h.queries) + i * h.d;
  int8_t* out = h.packed.data() + i * h.dpad;
  bool ok = true;
  const double c = h.metric == EUCLIDEAN ? 2.0 : 1.0;
  double resid;
  const double norm = center_row(x, mean, h.d, h.metric == COSINE, row, &ok);
  h.norm[i] = std::sqrt(squared_norm(x, h.d));
  const float s = quantise_row(row, h.d, q, &resid);
  int64_t sum = 0;
  for (int64_t e = 0; e < h.d; ++e) {
    out[e] = int8_t(q[e]);
    sum += q[e];
  }
  h.start[i] = int32_t(-128 * sum);
  h.scale[i] = float(c * s);
  const double e = kRound * norm;
  resid += e;
  const double quantised = norm + resid;  // at least the length of the quantised row
  h.err_norm[i] = round_up(c * (resid + 4.9e-7 * quantised) * 1.0001);
  h.err_resid[i] = round_up(c * quantised * 1.0001);
  if (h.metric == EUCLIDEAN) {
    h.shift[i] = norm * norm;
    h.err_add[i] = round_up((2.0 * norm * e + e * e) * 1.0001);
  } else {  // x.y = x~.y~ + mean.y~ + x.mean
    double xm = 0, mm = squared_norm(mean, h.d);
    for (int64_t f = 0; f < h.d; ++f) xm += double(row[f]) * double(mean[f]);
    h.shift[i] = -(xm + mm);
    h.err_add[i] = round_up(std::sqrt(mm) * e * 1.0001);
  }
  return ok && h.norm[i] < 1e150;
}

}  // namespace
