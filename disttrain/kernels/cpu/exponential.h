// e to the power of x, float32, a vector at a time, and the logistic function. The largest error of the power is 0.9
// units in the last place, and 1.2 where a product and a sum round one by one.
//
// x = n * ln 2 + r with a whole n and |r| <= ln 2 / 2; exp(x) = 2^n * (1 + r + r^2 * p(r)). ln 2 in two parts, of which
// the first has so few bits that its product with n is exact. p was fitted here to the smallest largest relative error
// of exp(r), 3e-9, by least squares with Lawson's weights.
//
// Source of the scheme: Cody & Waite, "Software manual for the elementary functions", 1980.
#pragma once

#include "row.h"

namespace disttrain {

// Returns p * 2^n for a whole n that `shifted` has in its last bits: see below.
inline Vector scaled(Vector p, Vector n, Vector shifted, Vector rounder) {
#if defined(__AVX512F__)
    (void)shifted, (void)rounder;
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
    (void)n;
    // 2^n as a product of two, since it may be too small, or too large, for one
    const Integers power = (Integers)shifted - (Integers)rounder, half = power >> 1;
    const Vector first = (Vector)((Bits)(half + 127) << 23), second = (Vector)((Bits)(power - half + 127) << 23);
    return p * first * second;
#endif
}

inline Vector exponential(Vector x) {
    // beyond these the result is infinity and 0 anyway; NaN stays
    x = smaller(broadcast(89.0f), x);
    x = larger(broadcast(-104.0f), x);
    const Vector rounder = broadcast(12582912.0f);  // 1.5 * 2^23: a sum with it has the whole number in its last bits
    const Vector shifted = multiply_add(x, broadcast(1.44269504f), rounder);
    const Vector n = shifted - rounder;
    Vector r = multiply_add(n, broadcast(-0.693359375f), x);
    r = multiply_add(n, broadcast(2.12194440e-4f), r);
    Vector p = broadcast(1.38146133e-3f);
    p = multiply_add(p, r, broadcast(8.36870989e-3f));
    p = multiply_add(p, r, broadcast(4.16683874e-2f));
    p = multiply_add(p, r, broadcast(1.66665207e-1f));
    p = multiply_add(p, r, broadcast(4.99999935e-1f));
    p = multiply_add(p, r, broadcast(1.0f));
    p = multiply_add(p, r, broadcast(1.0f));
    return scaled(p, n, shifted, rounder);
}

// s = 1 / (1 + exp(-x)), and s * (1 - s).
struct Shares {
    Vector below, product;

    explicit Shares(Vector x) {
        // of the negative size: exp does not overflow, and 1 - s loses no digits
        const Vector other = exponential(x > 0.0f ? -x : x), whole = 1.0f / (1.0f + other);
        below = x > 0.0f ? whole : other * whole;
        product = other * whole * whole;
    }
};

}  // namespace disttrain
