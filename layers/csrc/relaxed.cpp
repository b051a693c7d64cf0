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
void over_rows(int64_t rows, int threads, Work work, int64_t least = 32) {
    threads = static_cast<int>(std::min<int64_t>(threads, (rows + least - 1) / least));
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

// With V known the short loops along a row of keys become a few vector instructions.
template <int V>
void spread_work(const float* weights, const float* fresh, float* out, int64_t same, int64_t p,
                 int64_t q, int64_t k, int64_t u, int64_t v_given, int64_t begin, int64_t end) {
    const int64_t v = V ? V : v_given, block = k * (u + 1) * (v + 1);
    for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t tile = piece / (p + 1), a = piece % (p + 1);
        const float* source = weights + tile * p * q * k * u * v;
        const float* scale = fresh ? fresh + (tile % same) * p * q : nullptr;
        for (int64_t b = 0; b <= q; ++b) {
            float* goal = out + (piece * (q + 1) + b) * block;
            std::fill(goal, goal + block, 0.f);
            for (int da = 0; da < 2; ++da)
                for (int db = 0; db < 2; ++db) {
                    const int64_t i = a - da, j = b - db;
                    if (i < 0 || i >= p || j < 0 || j >= q) continue;
                    if (scale && scale[i * q + j] == 0.f) continue;
                    const float* row = source + (i * q + j) * k * u * v;
                    for (int64_t volume = 0; volume < k; ++volume) {
                        float* to = goal + (volume * (u + 1) + da) * (v + 1) + db;
                        for (int64_t r = 0; r < u; ++r, to += v + 1, row += v)
                            for (int64_t c = 0; c < v; ++c) to[c] += row[c];
                    }
                }
        }
    }
}

template <int V>
void sum_work(const float* products, float* out, int64_t p, int64_t q, int64_t k, int64_t u,
              int64_t v_given, int64_t begin, int64_t end) {
    const int64_t v = V ? V : v_given, block = k * (u + 1) * (v + 1);
    for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t tile = piece / p, i = piece % p;
        float* to = out + piece * q * k * u * v;
        for (int64_t j = 0; j < q; ++j) {
            const float* a = products + ((tile * (p + 1) + i) * (q + 1) + j) * block;
            const float* b = a + block + 1;
            const float* c = a + (q + 1) * block + (v + 1);
            const float* d = a + (q + 2) * block + (v + 1) + 1;
            for (int64_t volume = 0; volume < k; ++volume)
                for (int64_t r = 0; r < u; ++r, to += v) {
                    const int64_t at = (volume * (u + 1) + r) * (v + 1);
                    for (int64_t x = 0; x < v; ++x)
                        to[x] = (a[at + x] + b[at + x]) + (c[at + x] + d[at + x]);
                }
        }
    }
}

}  // namespace

extern "C" {

int relaxed_abi() { return 2; }

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

// Adjoint of the 2 x 2 diagonal sum: weights (p, q, k, u, v) of each tile, those of queries with
// fresh[tile % same, p, q] = 0 left out, into out (p + 1, q + 1, k, u + 1, v + 1).
void spread_tiles(const float* weights, const float* fresh, float* out, int64_t tiles, int64_t same,
                  int64_t p, int64_t q, int64_t k, int64_t u, int64_t v, int threads) {
    const auto work = v == 15 ? spread_work<15> : v == 18 ? spread_work<18> : spread_work<0>;
    over_rows(
        tiles * (p + 1), threads,
        [=](int64_t begin, int64_t end) {
            work(weights, fresh, out, same, p, q, k, u, v, begin, end);
        },
        1);
}

// The 2 x 2 diagonal sum: products (p + 1, q + 1, k, u + 1, v + 1) of each tile into (p, q, k, u, v).
void sum_tiles(const float* products, float* out, int64_t tiles, int64_t p, int64_t q, int64_t k,
               int64_t u, int64_t v, int threads) {
    const auto work = v == 15 ? sum_work<15> : v == 18 ? sum_work<18> : sum_work<0>;
    over_rows(
        tiles * p, threads,
        [=](int64_t begin, int64_t end) { work(products, out, p, q, k, u, v, begin, end); }, 1);
}

// Rows of blocks (b, g1, g2, planes, s, s) times scale (g1, g2), and images (b, planes, g1 s, g2 s):
// fill the images, or with `back` the rows.
void scale_between(float* rows, float* images, const float* scale, int64_t b, int64_t planes,
                   int64_t g1, int64_t g2, int64_t s, int back, int threads) {
    over_rows(
        b * planes, threads,
        [=](int64_t begin, int64_t end) {
            for (int64_t piece = begin; piece < end; ++piece) {
                const int64_t sample = piece / planes, plane = piece % planes;
                float* line = images + piece * g1 * g2 * s * s;
                for (int64_t i = 0; i < g1; ++i)
                    for (int64_t y = 0; y < s; ++y)
                        for (int64_t j = 0; j < g2; ++j, line += s) {
                            const int64_t block = (sample * g1 + i) * g2 + j;
                            float* row = rows + ((block * planes + plane) * s + y) * s;
                            const float factor = scale[i * g2 + j];
                            if (back)
                                for (int64_t x = 0; x < s; ++x) row[x] = line[x] * factor;
                            else
                                for (int64_t x = 0; x < s; ++x) line[x] = row[x] * factor;
                        }
            }
        },
        1);
}
}
