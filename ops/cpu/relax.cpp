// The K rounds of the relaxed selection on the CPU and their gradient: ops/relax.py. Plain C interface, no
// dependencies.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

template <class Number>
struct Scratch {
    const SmallAsZero mode;
    std::vector<Number> memory;
};

// work(row, memory) for all rows, some at a time, with n numbers of a thread's memory.
template <class Number, class Work>
int run_rows(int threads, int64_t rows, int64_t n, Work work) {
    const int64_t step = 32;
    const auto make = [n] { return Scratch<Number>{{}, std::vector<Number>(n)}; };
    return guarded([&] {
        run_tasks(threads, ceil_div(rows, step), make, [&](int64_t task, Scratch<Number>& scratch) {
            for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row)
                work(row, scratch.memory.data());
        });
    });
}

}  // namespace

extern "C" {

// first (rows, n): softmax of the logits; weights (rows, k, n). left[row] becomes 1 where a row left the
// range of the numbers: its weights are not to be used.
int relaxed_forward(const float* first, float* weights, uint8_t* left, int64_t rows, int64_t k, int64_t n,
                    int threads) {
    // With u = exp(alpha) and s its sum, w = u / s, and u becomes u (1 - w): the formulas of ops/relax.py.
    return run_rows<double>(threads, rows, n, [=](int64_t row, double* u) {
        const float* in = first + row * n;
        float* out = weights + row * k * n;
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; ++i) {
            u[i] = in[i];
            total += u[i];
            out[i] = in[i];
        }
        for (int64_t j = 1; j < k; ++j) {
            const double inverse = 1 / total;
            double next = 0;
#pragma omp simd reduction(+ : next)
            for (int64_t i = 0; i < n; ++i) {
                u[i] *= (total - u[i]) * inverse;  // 0 where u[i] is all there is
                next += u[i];
            }
            total = next;
            const double scale = 1 / total;
            float* volume = out + j * n;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) volume[i] = static_cast<float>(u[i] * scale);
        }
        left[row] = !(total > 1e-30);
    });
}

// weights, grad (rows, k, n) -> out (rows, n): the gradient of the logits.
int relaxed_backward(const float* weights, const float* grad, float* out, int64_t rows, int64_t k,
                     int64_t n, int threads) {
    return run_rows<float>(threads, rows, n, [=](int64_t row, float* direct) {
        float* total = out + row * n;
        std::fill(total, total + n, 0.f);
        for (int64_t j = k - 1; j >= 0; --j) {
            const float* w = weights + (row * k + j) * n;
            const float* g = grad + (row * k + j) * n;
            float slope = 0, rest = 0, pull = 0;
#pragma omp simd reduction(+ : slope, rest, pull)
            for (int64_t i = 0; i < n; ++i) {
                const bool near = w[i] >= 0.75f;  // at most one: its 1 - w is the sum of others
                const float other = near ? 0.f : w[i];
                direct[i] = g[i] * w[i] - other * total[i] / (1.f - other);
                slope += direct[i];
                rest += other;
                pull += near ? total[i] * w[i] : 0.f;
            }
            const float share = pull / std::max(rest, 1e-30f);
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                const bool near = w[i] >= 0.75f;
                const float more = near ? -total[i] * w[i] : w[i] * share;
                total[i] += direct[i] - w[i] * slope + more;
            }
        }
    });
}

}  // extern "C"
