// Optimizers' rules, float32, on flat arrays of n elements.
//
//   sgd       w += g * -rate
//   momentum  v = v * momentum + g * -rate;  w += v
//   nesterov  v = v * momentum + g * -rate;  w += g * -rate + momentum * v
//   adam      w *= keep;  m += (g - m) * a;  v += (g * g - v) * b;  w -= m / (sqrt(v) + epsilon) * rate
//             keep = 1 - rate * decay (AdamW), a = 1 - beta_1, b = 1 - beta_2, and rate with both corrections
//
// Each operation rounds as the definitions in disttrain/optimizers/ round: to the bit the same result, on any
// instruction set. Arrays are aligned to 4 bytes. They may overlap only as elementwise rules allow: the compiler checks.
//
// Sources: Keras 3; Kingma & Ba, "Adam: a method for stochastic optimization", 2014.

#include <cmath>

#include "parallel.h"

using namespace disttrain;

constexpr int64_t LEAST = 1 << 15;  // elements of a thread

extern "C" {

void disttrain_sgd(int64_t n, float* w, const float* g, float rate) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) w[i] += g[i] * -rate;
    });
}

void disttrain_momentum(int64_t n, float* w, const float* g, float* v, float rate, float momentum) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            v[i] = v[i] * momentum + g[i] * -rate;
            w[i] += v[i];
        }
    });
}

void disttrain_nesterov(int64_t n, float* w, const float* g, float* v, float rate, float momentum) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            float change = g[i] * -rate;
            v[i] = v[i] * momentum + change;
            w[i] += change + momentum * v[i];
        }
    });
}

void disttrain_adam(int64_t n, float* w, const float* g, float* m, float* v, float rate, float keep, float a,
                           float b, float epsilon) {
    parallel(n, LEAST, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            float mean = m[i] + (g[i] - m[i]) * a;
            float square = v[i] + (g[i] * g[i] - v[i]) * b;
            m[i] = mean;
            v[i] = square;
            w[i] = w[i] * keep - mean / (std::sqrt(square) + epsilon) * rate;
        }
    });
}

}  // extern "C"
