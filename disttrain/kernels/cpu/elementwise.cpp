// Elementwise functions, float32, on n elements that lie together, in one pass; s(x) = 1 / (1 + exp(-x)).
//
//   where_positive     out = g where y > 0, else g * 0: the gradient of relu
//   silu               out = x * s(x)
//   silu_gradient      out = g * (s(x) + x * s(x) * (1 - s(x)))
//   softplus           out = log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))
//   softplus_gradient  out = g * s(x)
//
// where_positive is to the bit what the definition gives. Of the others an error is at most 9 * 2^-24 of the size of
// the terms that are added, and 2^-149 times what exp(-|x|) is multiplied by where that is denormal. NaN and infinities
// come out as in disttrain/autodiff/ops. Arrays are aligned to 4 bytes; `out` does not overlap the others.

#include "exponential.h"

using namespace disttrain;

namespace {

constexpr int64_t LEAST = 1 << 15;         // elements of a thread
constexpr int64_t LEAST_OF_POWERS = 1 << 14;

// Computes out[i], a vector at a time, by each(i, at): at.get reads what lies there.
template <typename Each> void map(int64_t n, float* out, const Each& each) {
    parallel(n, LEAST_OF_POWERS, [&](int64_t begin, int64_t end) {
        for_vectors(end - begin, [&](int64_t i, auto at) { at.put(out + begin + i, each(begin + i, at)); });
    });
}

// log(1 + u) for u from 0 to 1, to 2^-22 of it: 2 * atanh(z), z = u / (2 + u) <= 1 / 3. The quotient of atanh(z) and z was
// fitted here as a polynomial in z^2 to the smallest largest relative error, 4e-9, by least squares with Lawson's weights.
Vector log_of_one_and(Vector u) {
    const Vector z = u / (2.0f + u), s = z * z;
    Vector p = broadcast(0.1408916711807251f);
    p = multiply_add(p, s, broadcast(0.13980300724506378f));
    p = multiply_add(p, s, broadcast(0.20012454688549042f));
    p = multiply_add(p, s, broadcast(0.3333315849304199f));
    p = multiply_add(p, s, broadcast(1.0f));
    return (z + z) * p;
}

}  // namespace

extern "C" {

void disttrain_where_positive(int64_t n, const float* g, const float* y, float* __restrict out) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        // a product, not a choice: NaN * 0 is NaN, as in the definition
        for (int64_t i = begin; i < end; i++) out[i] = g[i] * (y[i] > 0.0f ? 1.0f : 0.0f);
    });
}

void disttrain_silu(int64_t n, const float* x, float* out) {
    map(n, out, [=](int64_t i, auto at) {
        const Vector value = at.get(x + i, 0.0f);
        return value * Shares(value).below;
    });
}

void disttrain_silu_gradient(int64_t n, const float* g, const float* x, float* out) {
    map(n, out, [=](int64_t i, auto at) {
        const Vector value = at.get(x + i, 0.0f);
        const Shares shares(value);
        return at.get(g + i, 0.0f) * multiply_add(value, shares.product, shares.below);
    });
}

void disttrain_softplus(int64_t n, const float* x, float* out) {
    map(n, out, [=](int64_t i, auto at) {
        const Vector value = at.get(x + i, 0.0f);
        // a NaN that is lost in the first arrives with the second
        return larger(value, broadcast(0.0f)) + log_of_one_and(exponential(value > 0.0f ? -value : value));
    });
}

void disttrain_softplus_gradient(int64_t n, const float* g, const float* x, float* out) {
    map(n, out, [=](int64_t i, auto at) { return at.get(g + i, 0.0f) * Shares(at.get(x + i, 0.0f)).below; });
}

}  // extern "C"
