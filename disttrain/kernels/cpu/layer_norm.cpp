// Layer normalization, float32, and its gradients. Each row of n is read from memory once.
//
//   layer_norm        y = (x - mean) * rate * gamma + beta, mean of the row, rate = 1 / sqrt(variance + epsilon)
//   layer_norm_input  rate * (h - mean(h) - z * mean(h * z)), h = g * gamma, z = (x - mean) * rate
//   layer_norm_scale  sum of g * z over rows, then sum of g: the gradients of gamma and beta
//
// Shapes: x, y, g (rows, n); gamma, beta (n); the last's result (2, n); dense in C order, aligned to 4 bytes; what is
// written overlaps nothing.
//
// The variance is formed in a second pass: a mean much larger than the spread costs no digits. A row's bits depend on
// that row only; sums over rows are formed 16 rows at a time.
//
// Source: Ba, Kiros & Hinton, "Layer normalization", 2016; the gradient follows by the chain rule.

#include <algorithm>
#include <cmath>

#include "row.h"

using namespace disttrain;

namespace {

constexpr int64_t BLOCK = 16;  // rows whose sums are formed in registers

struct Moments {
    float mean, rate;

    Moments() = default;
    Moments(int64_t n, const float* x, float epsilon) {
        Vector sum{}, squares{};
        for_vectors(n, [&](int64_t i, auto at) { sum += at.get(x + i, 0.0f); });
        mean = sum_of(sum) / static_cast<float>(n);
        for_vectors(n, [&](int64_t i, auto at) {
            Vector centered = at.get(x + i, mean) - mean;
            squares = multiply_add(centered, centered, squares);
        });
        rate = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + epsilon);
    }
};

}  // namespace

extern "C" {

void disttrain_layer_norm(int64_t rows, int64_t n, const float* x, const float* gamma, const float* beta, float epsilon,
                          float* y) {
    for_rows(rows, n, [=](int64_t row) {
        const float* from = x + row * n;
        float* to = y + row * n;
        const Moments own(n, from, epsilon);
        for_vectors(n, [&](int64_t i, auto at) {
            Vector z = (at.get(from + i, 0.0f) - own.mean) * own.rate;
            at.put(to + i, multiply_add(z, at.get(gamma + i, 0.0f), at.get(beta + i, 0.0f)));
        });
    });
}

void disttrain_layer_norm_input(int64_t rows, int64_t n, const float* g, const float* x, const float* gamma,
                                float epsilon, float* out) {
    for_rows(rows, n, [=](int64_t row) {
        const float *cotangent = g + row * n, *from = x + row * n;
        float* to = out + row * n;
        const Moments own(n, from, epsilon);
        Vector sum{}, along{};
        for_vectors(n, [&](int64_t i, auto at) {
            Vector h = at.get(cotangent + i, 0.0f) * at.get(gamma + i, 0.0f);
            sum += h;
            along = multiply_add(h, (at.get(from + i, 0.0f) - own.mean) * own.rate, along);
        });
        const float mean = sum_of(sum) / static_cast<float>(n), slope = sum_of(along) / static_cast<float>(n);
        for_vectors(n, [&](int64_t i, auto at) {
            Vector h = at.get(cotangent + i, 0.0f) * at.get(gamma + i, 0.0f);
            Vector z = (at.get(from + i, 0.0f) - own.mean) * own.rate;
            at.put(to + i, (h - mean - z * slope) * own.rate);
        });
    });
}

void disttrain_layer_norm_scale(int64_t rows, int64_t n, const float* g, const float* x, float epsilon, float* out) {
    std::fill(out, out + 2 * n, 0.0f);
    Moments of[BLOCK];
    for (int64_t begin = 0; begin < rows; begin += BLOCK, g += BLOCK * n, x += BLOCK * n) {
        const int64_t count = std::min(BLOCK, rows - begin);
        for (int64_t row = 0; row < count; row++) of[row] = Moments(n, x + row * n, epsilon);
        for_vectors(n, [&](int64_t i, auto at) {
            Vector scaled{}, sum{};
            for (int64_t row = 0; row < count; row++) {
                Vector own = at.get(g + row * n + i, 0.0f);
                Vector z = (at.get(x + row * n + i, 0.0f) - of[row].mean) * of[row].rate;
                scaled = multiply_add(own, z, scaled);
                sum += own;
            }
            at.put(out + i, at.get(out + i, 0.0f) + scaled);
            at.put(out + n + i, at.get(out + n + i, 0.0f) + sum);
        });
    }
}

}  // extern "C"
