// GELU and its gradient, float32, on n elements that lie together, in one pass.
//
//   gelu           y = x * P(x), P the distribution of a standard normal variable
//   gelu_gradient  g * (P(x) + x * P'(x))
//
// Both forms of P are 1 / (1 + exp(-x * q(x^2))). By tanh, q(s) = 2 * sqrt(2 / pi) * (1 + 0.044715 * s). For the exact
// one q was fitted here to the logarithm of P / (1 - P), over x, on (0, 6]: the error of P is 3e-8 at most, by least
// squares with Lawson's weights. Further out q keeps its value, so that exp soon gives 0 as the definition does.
//
// The error of y is at most 3 units in the last place of x, that of the gradient 2^-22 of g. Arrays are aligned to 4
// bytes; `out` does not overlap the others.
//
// Source: Hendrycks & Gimpel, "Gaussian error linear units", 2016.

#include "exponential.h"

using namespace disttrain;

namespace {

struct Exact {
    static Vector logit(Vector x) {
        const Vector s = smaller(x * x, broadcast(36.0f));
        Vector q = broadcast(3.512341658713457e-09f);
        q = multiply_add(q, s, broadcast(-2.6452668555636014e-07f));
        q = multiply_add(q, s, broadcast(7.92948891605919e-06f));
        q = multiply_add(q, s, broadcast(-0.0001106123878627463f));
        q = multiply_add(q, s, broadcast(-6.518995007536939e-05f));
        q = multiply_add(q, s, broadcast(0.07266616914689182f));
        return x * multiply_add(q, s, broadcast(1.5957698829209732f));
    }
    static Vector slope(Vector x, Vector) { return exponential(x * x * -0.5f) * 0.3989422804014327f; }
};

struct Approximate {
    static constexpr float FIRST = 1.5957691216057308f, THIRD = 0.07135481627260025f;

    static Vector logit(Vector x) {
        return x * multiply_add(smaller(x * x, broadcast(100.0f)), broadcast(THIRD), broadcast(FIRST));
    }
    static Vector slope(Vector x, Vector product) {
        return product * multiply_add(smaller(x * x, broadcast(100.0f)), broadcast(3 * THIRD), broadcast(FIRST));
    }
};

constexpr int64_t LEAST = 1 << 14;  // elements of a thread

template <typename Form> void compute(int64_t n, const float* x, float* out) {
    for_vectors(n, [&](int64_t i, auto at) {
        Vector value = at.get(x + i, 0.0f);
        at.put(out + i, value * Shares(Form::logit(value)).below);
    });
}

template <typename Form> void differentiate(int64_t n, const float* g, const float* x, float* out) {
    for_vectors(n, [&](int64_t i, auto at) {
        Vector value = at.get(x + i, 0.0f);
        Shares shares(Form::logit(value));
        Vector slope = multiply_add(value, Form::slope(value, shares.product), shares.below);
        at.put(out + i, at.get(g + i, 0.0f) * slope);
    });
}

}  // namespace

extern "C" {

void disttrain_gelu(int64_t n, int64_t approximate, const float* x, float* out) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        (approximate ? compute<Approximate> : compute<Exact>)(end - begin, x + begin, out + begin);
    });
}

void disttrain_gelu_gradient(int64_t n, int64_t approximate, const float* g, const float* x, float* out) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        (approximate ? differentiate<Approximate> : differentiate<Exact>)(end - begin, g + begin, x + begin, out + begin);
    });
}

}  // extern "C"
