// The K rounds of the relaxed nearest-neighbor selection, and their gradient, row by row in cache.
//
// With u = exp(alpha) and s its sum, w = u / s, and u becomes u (1 - w): the formulas of layers/n3.py.
// Rows are independent; all memory is the caller's. Plain C interface, no dependencies.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

template <class Work>
void over_rows(int64_t rows, int threads, Work work) {
    threads = static_cast<int>(std::min<int64_t>(threads, (rows + 31) / 32));
    if (threads <= 1) {
        work(0, rows);
        return;
    }
    std::vector<std::thread> team;
    const int64_t step = (rows + threads - 1) / threads;
    for (int i = 1; i < threads; ++i)
        team.emplace_back([=] { work(i * step, std::min(rows, (i + 1) * step)); });
    work(0, std::min(rows, step));
    for (auto& one : team) one.join();
}

}  // namespace

extern "C" {

int relaxed_abi() { return 1; }

// first (rows, n): softmax of the logits; weights (rows, k, n). Returns how many rows left the range
// of float32: their weights are not to be used; `left[row]` is 1 for them.
int64_t relaxed_forward(const float* first, float* weights, uint8_t* left, int64_t rows, int64_t k,
                        int64_t n, int threads) {
    over_rows(rows, threads, [=](int64_t begin, int64_t end) {
        std::vector<double> u(n);
        for (int64_t row = begin; row < end; ++row) {
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
                double next = 0;
#pragma omp simd reduction(+ : next)
                for (int64_t i = 0; i < n; ++i) {
                    u[i] -= u[i] * (u[i] / total);
                    next += u[i];
                }
                total = next;
                const double inverse = 1 / total;
                float* volume = out + j * n;
                for (int64_t i = 0; i < n; ++i) volume[i] = static_cast<float>(u[i] * inverse);
            }
            left[row] = !(total > 1e-30);
        }
    });
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) count += left[row];
    return count;
}

// weights, grad (rows, k, n) -> out (rows, n): the gradient of the logits.
void relaxed_backward(const float* weights, const float* grad, float* out, int64_t rows, int64_t k,
                      int64_t n, int threads) {
    over_rows(rows, threads, [=](int64_t begin, int64_t end) {
        std::vector<float> direct(n);
        for (int64_t row = begin; row < end; ++row) {
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
        }
    });
}

// Adjoint of the 2 x 2 diagonal sum: weights (p, q, k, u, v) of one tile, times fresh[p, q] if given,
// into out (p + 1, q + 1, k, u + 1, v + 1).
void spread_tiles(const float* weights, const float* fresh, float* out, int64_t tiles, int64_t same,
                  int64_t p, int64_t q, int64_t k, int64_t u, int64_t v, int threads) {
    over_rows(tiles * (p + 1) * 32, threads, [=](int64_t begin, int64_t end) {
        for (int64_t piece = (begin + 31) / 32; piece < (end + 31) / 32; ++piece) {
            const int64_t tile = piece / (p + 1), a = piece % (p + 1);
            const float* source = weights + tile * p * q * k * u * v;
            const float* scale = fresh ? fresh + (tile % same) * p * q : nullptr;
            for (int64_t b = 0; b <= q; ++b) {
                float* goal = out + ((tile * (p + 1) + a) * (q + 1) + b) * k * (u + 1) * (v + 1);
                std::fill(goal, goal + k * (u + 1) * (v + 1), 0.f);
                for (int da = 0; da < 2; ++da)
                    for (int db = 0; db < 2; ++db) {
                        const int64_t i = a - da, j = b - db;
                        if (i < 0 || i >= p || j < 0 || j >= q) continue;
                        const float factor = scale ? scale[i * q + j] : 1.f;
                        if (factor == 0.f) continue;
                        const float* from = source + (i * q + j) * k * u * v;
                        for (int64_t volume = 0; volume < k; ++volume)
                            for (int64_t r = 0; r < u; ++r) {
                                float* to = goal + (volume * (u + 1) + r + da) * (v + 1) + db;
                                const float* row = from + (volume * u + r) * v;
                                for (int64_t c = 0; c < v; ++c) to[c] += row[c];
                            }
                    }
            }
        }
    });
}

// The 2 x 2 diagonal sum: products (p + 1, q + 1, k, u + 1, v + 1) of one tile into (p, q, k, u, v).
void sum_tiles(const float* products, float* out, int64_t tiles, int64_t p, int64_t q, int64_t k,
               int64_t u, int64_t v, int threads) {
    over_rows(tiles * p * 32, threads, [=](int64_t begin, int64_t end) {
        for (int64_t piece = (begin + 31) / 32; piece < (end + 31) / 32; ++piece) {
            const int64_t tile = piece / p, i = piece % p;
            const int64_t block = k * (u + 1) * (v + 1);
            for (int64_t j = 0; j < q; ++j) {
                const float* a = products + ((tile * (p + 1) + i) * (q + 1) + j) * block;
                const float* b = a + block + 1;
                const float* c = a + (q + 1) * block + (v + 1);
                const float* d = a + (q + 2) * block + (v + 1) + 1;
                float* to = out + ((tile * p + i) * q + j) * k * u * v;
                for (int64_t volume = 0; volume < k; ++volume)
                    for (int64_t r = 0; r < u; ++r) {
                        const int64_t at = (volume * (u + 1) + r) * (v + 1);
                        for (int64_t x = 0; x < v; ++x)
                            to[x] = (a[at + x] + b[at + x]) + (c[at + x] + d[at + x]);
                        to += v;
                    }
            }
        }
    });
}
}
