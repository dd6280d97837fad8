// Softmax along the last axis and losses made of it, float32, with their gradients. Each row of n is read from memory
// once: the passes over it find it in the cache.
//
//   softmax                       y = exp(x - max) / sum(exp(x - max))
//   softmax_gradient              y * (g - sum(g * y))
//   log_softmax                   y = x - max - log(sum(exp(x - max)))
//   log_softmax_gradient          g - exp(y) * sum(g)
//   softmax_cross_entropy         -sum(t * log(softmax(x)))
//   sparse_softmax_cross_entropy  -log(softmax(x))[label]
//   their gradients in x          g * (softmax(x) * sum(t) - t);  g * (softmax(x) - 1 at the label)
//
// Shapes: x, y, t (rows, n), losses and g of losses (rows), labels (rows) of int64; dense in C order, aligned to their
// elements' size; what is written overlaps nothing. The g of losses may be broadcast: see Spread.
//
// A row's bits depend on that row only. NaN and infinities come out as in disttrain/autodiff/ops.

#include <algorithm>
#include <cmath>
#include <limits>

#include "exponential.h"

using namespace disttrain;

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

float largest(int64_t n, const float* x) {
    Vector most = broadcast(-INFINITE);
    // a NaN that is lost here arrives with the sum
    for_vectors(n, [&](int64_t i, auto at) { most = larger(at.get(x + i, -INFINITE), most); });
    return largest_of(most);
}

// Writes exp(x - most) and returns the sum.
float exponentials(int64_t n, const float* x, float most, float* y) {
    Vector sum{};
    for_vectors(n, [&](int64_t i, auto at) {
        Vector value = exponential(at.get(x + i, -INFINITE) - most);
        at.put(y + i, value);
        sum += value;
    });
    return sum_of(sum);
}

float sum_of_exponentials(int64_t n, const float* x, float most) {
    Vector sum{};
    for_vectors(n, [&](int64_t i, auto at) { sum += exponential(at.get(x + i, -INFINITE) - most); });
    return sum_of(sum);
}

// Multiplies y by factor.
void scale(int64_t n, float* y, float factor) {
    for_vectors(n, [&](int64_t i, auto at) { at.put(y + i, at.get(y + i, 0.0f) * factor); });
}

// Returns the place that a label names in a row of n, as in NumPy: counted from the end where it is negative.
int64_t place_of(int64_t label, int64_t n) { return label < 0 ? label + n : label; }

bool all_name_one_of(int64_t n, int64_t rows, const int64_t* labels) {
    return std::all_of(labels, labels + rows, [=](int64_t label) { return label >= -n && label < n; });
}

}  // namespace

// A value for each of rows = outer * inner, where values may lie at the same place: as in disttrain/kernels/softmax.py.
struct Spread {
    int64_t inner, outer_step, inner_step;  // steps in floats

    float at(const float* g, int64_t row) const { return g[row / inner * outer_step + row % inner * inner_step]; }
};

extern "C" {

void disttrain_softmax(int64_t rows, int64_t n, const float* x, float* y) {
    for_rows(rows, n, [=](int64_t row) {
        const float* own = x + row * n;
        scale(n, y + row * n, 1.0f / exponentials(n, own, largest(n, own), y + row * n));
    });
}

void disttrain_softmax_gradient(int64_t rows, int64_t n, const float* g, const float* y, float* out) {
    for_rows(rows, n, [=](int64_t row) {
        const float *from = g + row * n, *share = y + row * n;
        float* to = out + row * n;
        Vector sum{};
        for_vectors(n, [&](int64_t i, auto at) {
            sum = multiply_add(at.get(from + i, 0.0f), at.get(share + i, 0.0f), sum);
        });
        const float mean = sum_of(sum);
        for_vectors(n, [&](int64_t i, auto at) {
            at.put(to + i, at.get(share + i, 0.0f) * (at.get(from + i, 0.0f) - mean));
        });
    });
}

void disttrain_log_softmax(int64_t rows, int64_t n, const float* x, float* y) {
    for_rows(rows, n, [=](int64_t row) {
        const float* own = x + row * n;
        const float most = largest(n, own), log_sum = std::log(sum_of_exponentials(n, own, most));
        for_vectors(n, [&](int64_t i, auto at) { at.put(y + row * n + i, at.get(own + i, most) - most - log_sum); });
    });
}

void disttrain_log_softmax_gradient(int64_t rows, int64_t n, const float* g, const float* y, float* out) {
    for_rows(rows, n, [=](int64_t row) {
        const float *from = g + row * n, *logarithm = y + row * n;
        Vector sum{};
        for_vectors(n, [&](int64_t i, auto at) { sum += at.get(from + i, 0.0f); });
        const float total = sum_of(sum);
        for_vectors(n, [&](int64_t i, auto at) {
            at.put(out + row * n + i, at.get(from + i, 0.0f) - exponential(at.get(logarithm + i, 0.0f)) * total);
        });
    });
}

void disttrain_softmax_cross_entropy(int64_t rows, int64_t n, const float* x, const float* t, float* losses) {
    for_rows(rows, n, [=](int64_t row) {
        const float *own = x + row * n, *target = t + row * n;
        const float most = largest(n, own), log_sum = std::log(sum_of_exponentials(n, own, most));
        Vector sum{};
        for_vectors(n, [&](int64_t i, auto at) {
            sum = multiply_add(at.get(target + i, 0.0f), at.get(own + i, most) - most - log_sum, sum);
        });
        losses[row] = -sum_of(sum);
    });
}

void disttrain_softmax_cross_entropy_gradient(int64_t rows, int64_t n, const Spread* spread, const float* g,
                                              const float* x, const float* t, float* out) {
    for_rows(rows, n, [=](int64_t row) {
        const float *own = x + row * n, *target = t + row * n;
        float* to = out + row * n;
        const float cotangent = spread->at(g, row), sum = exponentials(n, own, largest(n, own), to);
        Vector targets{};
        for_vectors(n, [&](int64_t i, auto at) { targets += at.get(target + i, 0.0f); });
        const float factor = sum_of(targets) / sum;
        for_vectors(n, [&](int64_t i, auto at) {
            at.put(to + i, (at.get(to + i, 0.0f) * factor - at.get(target + i, 0.0f)) * cotangent);
        });
    });
}

// Returns whether a label names no place in its row; then nothing is written.
int disttrain_sparse_softmax_cross_entropy(int64_t rows, int64_t n, const float* x, const int64_t* labels,
                                           float* losses) {
    if (!all_name_one_of(n, rows, labels)) return 1;
    for_rows(rows, n, [=](int64_t row) {
        const float* own = x + row * n;
        const float most = largest(n, own);
        losses[row] = std::log(sum_of_exponentials(n, own, most)) - (own[place_of(labels[row], n)] - most);
    });
    return 0;
}

// Returns whether a label names no place in its row, as above.
int disttrain_sparse_softmax_cross_entropy_gradient(int64_t rows, int64_t n, const Spread* spread, const float* g,
                                                    const float* x, const int64_t* labels, float* out) {
    if (!all_name_one_of(n, rows, labels)) return 1;
    for_rows(rows, n, [=](int64_t row) {
        const float* own = x + row * n;
        float *to = out + row * n, *at_label = to + place_of(labels[row], n);
        const float cotangent = spread->at(g, row), factor = 1.0f / exponentials(n, own, largest(n, own), to);
        const float label = (*at_label * factor - 1.0f) * cotangent;
        scale(n, to, factor * cotangent);
        *at_label = label;
    });
    return 0;
}

}  // extern "C"
