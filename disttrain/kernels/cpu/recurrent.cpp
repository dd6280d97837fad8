// Recurrent layers over whole sequences, and their gradients, float32; s is the logistic function.
//
//   lstm   i, f, o = s(x W + h U + b), g = tanh(x W + h U + b);  c = f c + i g;  h = o tanh(c)
//   gru    z, r = s(x W + b + h U + b'), k = tanh(x W + b + r (h U + b'));  h = z h + (1 - z) k
//
// x: (samples, steps, features), y: (samples, steps, units), all h; W: (features, gates * units), U: (units, gates *
// units), gates in the order i, f, g, o and z, r, k. b: (4 * units), of a GRU (2, 3 * units): b, b'. c and h begin as 0.
// All dense, aligned to 4 bytes; results do not overlap arguments.
//
// What does not depend on the step before is one product over all steps. The gradients compute gates and c again: y is
// known, so for all steps at once.
//
// Sources: Hochreiter & Schmidhuber, "Long short-term memory", 1997, with the forget gate of Gers et al., 2000; Cho et
// al., "Learning phrase representations using RNN encoder-decoder", 2014, in the form of cuDNN and Keras.

#include <algorithm>

#include "exponential.h"
#include "matmul.h"
#include "row.h"
#include "scratch.h"

using namespace disttrain;

// As in disttrain/kernels/recurrent.py.
struct Recurrence {
    int64_t samples, steps, features, units;

    int64_t rows() const { return samples * steps; }
};

namespace {

thread_local Scratch scratch;

int64_t bytes(int64_t floats) { return Scratch::rounded(floats * static_cast<int64_t>(sizeof(float))); }

Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// Within a few units in the last place. Source of the polynomial: Moshier, Cephes library, tanhf.c.
Vector tanh(Vector x) {
    const Vector square = x * x;
    Vector p = broadcast(-5.70498872745e-3f);
    p = multiply_add(p, square, broadcast(2.06390887954e-2f));
    p = multiply_add(p, square, broadcast(-5.37397155531e-2f));
    p = multiply_add(p, square, broadcast(1.33314422036e-1f));
    p = multiply_add(p, square, broadcast(-3.33332819422e-1f));
    p = multiply_add(p * square, x, x);
    return square < 0.625f * 0.625f ? p : 1.0f - 2.0f / (exponential(x + x) + 1.0f);
}

Vector slope_of_sigmoid(Vector y) { return y * (1.0f - y); }
Vector slope_of_tanh(Vector y) { return 1.0f - y * y; }

// Writes the h that each step begins with.
void shift(const Recurrence& r, const float* y, float* before) {
    for (int64_t s = 0; s < r.samples; s++, y += r.steps * r.units) {
        before = std::fill_n(before, r.units, 0.0f);
        before = std::copy_n(y, (r.steps - 1) * r.units, before);
    }
}

void sum_rows(int64_t rows, int64_t n, const float* a, float* sums) {
    std::fill_n(sums, n, 0.0f);
    for (int64_t row = 0; row < rows; row++, a += n)
        for (int64_t j = 0; j < n; j++) sums[j] += a[j];
}

// Computes g right^T and left^T g, the gradients of a product (rows, k) (k, n); the first where it is asked for.
bool product_gradients(int64_t rows, int64_t k, int64_t n, const float* g, const float* left, const float* right,
                       float* left_g, float* right_g) {
    return (!left_g || multiply(rows, k, n, {g, n, 1}, {right, 1, n}, left_g, k)) &&
           multiply(k, n, rows, {left, 1, k}, {g, n, 1}, right_g, n);
}

// Turns the sums of each sample at step t into gates, and computes c; h too where y is given.
void lstm_step(const Recurrence& r, int64_t t, float* gates, float* cells, float* y) {
    const int64_t n = r.units;
    for (int64_t row = t; row < r.rows(); row += r.steps) {
        float *z = gates + row * 4 * n, *c = cells + row * n, *h = y + row * n;
        for_vectors(n, [&](int64_t j, auto at) {
            Vector in = sigmoid(at.get(z + j, 0)), forget = sigmoid(at.get(z + n + j, 0));
            Vector made = tanh(at.get(z + 2 * n + j, 0)), out = sigmoid(at.get(z + 3 * n + j, 0));
            Vector cell = in * made;
            if (t > 0) cell = multiply_add(forget, at.get(c - n + j, 0), cell);
            at.put(z + j, in), at.put(z + n + j, forget), at.put(z + 2 * n + j, made), at.put(z + 3 * n + j, out);
            at.put(c + j, cell);
            if (y) at.put(h + j, out * tanh(cell));
        });
    }
}

// Turns gates at step t into cotangents of their sums, given those of h from later steps; c_g: of c, from t + 1 to t.
void lstm_step_back(const Recurrence& r, int64_t t, const float* g, const float* h_g, const float* cells, float* c_g,
                    float* gates) {
    const int64_t n = r.units;
    for (int64_t row = t; row < r.rows(); row += r.steps, h_g += n, c_g += n) {
        float* z = gates + row * 4 * n;
        const float *c = cells + row * n, *own = g + row * n;
        for_vectors(n, [&](int64_t j, auto at) {
            Vector in = at.get(z + j, 0), forget = at.get(z + n + j, 0);
            Vector made = at.get(z + 2 * n + j, 0), out = at.get(z + 3 * n + j, 0);
            Vector bent = tanh(at.get(c + j, 0)), before = t > 0 ? at.get(c - n + j, 0) : Vector{};
            Vector of_h = at.get(own + j, 0) + at.get(h_g + j, 0);
            Vector of_c = at.get(c_g + j, 0) + of_h * out * slope_of_tanh(bent);
            at.put(z + j, of_c * made * slope_of_sigmoid(in));
            at.put(z + n + j, of_c * before * slope_of_sigmoid(forget));
            at.put(z + 2 * n + j, of_c * in * slope_of_tanh(made));
            at.put(z + 3 * n + j, of_h * bent * slope_of_sigmoid(out));
            at.put(c_g + j, of_c * forget);
        });
    }
}

// Turns what x adds to the gates of each sample at step t into gates, given what h adds; computes h where y is given.
void gru_step(const Recurrence& r, int64_t t, float* gates, const float* from_h, float* y) {
    const int64_t n = r.units;
    for (int64_t row = t; row < r.rows(); row += r.steps) {
        float *a = gates + row * 3 * n, *h = y + row * n;
        const float* b = from_h + row * 3 * n;
        for_vectors(n, [&](int64_t j, auto at) {
            Vector keep = sigmoid(at.get(a + j, 0) + at.get(b + j, 0));
            Vector reset = sigmoid(at.get(a + n + j, 0) + at.get(b + n + j, 0));
            Vector made = tanh(multiply_add(reset, at.get(b + 2 * n + j, 0), at.get(a + 2 * n + j, 0)));
            at.put(a + j, keep), at.put(a + n + j, reset), at.put(a + 2 * n + j, made);
            if (!y) return;
            Vector made_part = (1.0f - keep) * made;
            at.put(h + j, t > 0 ? multiply_add(keep, at.get(h - n + j, 0), made_part) : made_part);
        });
    }
}

// Turns gates at step t, and what h added to them, into the cotangents of what x and h added. h_g: from that of h after
// the step, without g, to what of it goes past the gates to h before it.
void gru_step_back(const Recurrence& r, int64_t t, const float* g, const float* before, float* h_g, float* gates,
                   float* from_h) {
    const int64_t n = r.units;
    for (int64_t row = t; row < r.rows(); row += r.steps, h_g += n) {
        float *a = gates + row * 3 * n, *b = from_h + row * 3 * n;
        const float *h = before + row * n, *own = g + row * n;
        for_vectors(n, [&](int64_t j, auto at) {
            Vector keep = at.get(a + j, 0), reset = at.get(a + n + j, 0), made = at.get(a + 2 * n + j, 0);
            Vector of_h = at.get(own + j, 0) + at.get(h_g + j, 0);
            Vector of_made = of_h * (1.0f - keep) * slope_of_tanh(made);
            Vector of_keep = of_h * (at.get(h + j, 0) - made) * slope_of_sigmoid(keep);
            Vector of_reset = of_made * at.get(b + 2 * n + j, 0) * slope_of_sigmoid(reset);
            at.put(a + j, of_keep), at.put(a + n + j, of_reset), at.put(a + 2 * n + j, of_made);
            at.put(b + j, of_keep), at.put(b + n + j, of_reset), at.put(b + 2 * n + j, of_made * reset);
            at.put(h_g + j, of_h * keep);
        });
    }
}

}  // namespace

extern "C" {

// Each returns 0; 1 where there is no memory. There are a step and a unit.

int disttrain_lstm(const Recurrence* r, const float* x, const float* w, const float* u, const float* b, float* y) {
    const int64_t n = r->units, row = 4 * n;
    if (!scratch.reserve(bytes(r->rows() * row) + bytes(r->rows() * n))) return 1;
    float *gates = scratch.take<float>(r->rows() * row), *cells = scratch.take<float>(r->rows() * n);
    if (!multiply(r->rows(), row, r->features, {x, r->features, 1}, {w, row, 1}, gates, row, {b})) return 1;
    for (int64_t t = 0; t < r->steps; t++) {
        if (t > 0 && !multiply(r->samples, row, n, {y + (t - 1) * n, r->steps * n, 1}, {u, row, 1}, gates + t * row,
                               r->steps * row, {nullptr, false, true}))
            return 1;
        lstm_step(*r, t, gates, cells, y);
    }
    return 0;
}

// x_g is null where nobody asks for it.
int disttrain_lstm_gradients(const Recurrence* r, const float* g, const float* y, const float* x, const float* w,
                             const float* u, const float* b, float* x_g, float* w_g, float* u_g, float* b_g) {
    const int64_t n = r->units, row = 4 * n, steps = r->steps, rows = r->rows();
    if (!scratch.reserve(bytes(rows * row) + 2 * bytes(rows * n) + 2 * bytes(r->samples * n))) return 1;
    float *gates = scratch.take<float>(rows * row), *cells = scratch.take<float>(rows * n);
    float *before = scratch.take<float>(rows * n);
    float *h_g = scratch.take<float>(r->samples * n), *c_g = scratch.take<float>(r->samples * n);
    shift(*r, y, before);
    if (!multiply(rows, row, r->features, {x, r->features, 1}, {w, row, 1}, gates, row, {b}) ||
        !multiply(rows, row, n, {before, n, 1}, {u, row, 1}, gates, row, {nullptr, false, true}))
        return 1;
    for (int64_t t = 0; t < steps; t++) lstm_step(*r, t, gates, cells, nullptr);
    std::fill_n(h_g, r->samples * n, 0.0f);
    std::fill_n(c_g, r->samples * n, 0.0f);
    for (int64_t t = steps - 1; t >= 0; t--) {
        lstm_step_back(*r, t, g, h_g, cells, c_g, gates);
        if (t > 0 && !multiply(r->samples, n, row, {gates + t * row, steps * row, 1}, {u, 1, row}, h_g, n)) return 1;
    }
    sum_rows(rows, row, gates, b_g);
    return !product_gradients(rows, r->features, row, gates, x, w, x_g, w_g) ||
           !product_gradients(rows, n, row, gates, before, u, nullptr, u_g);
}

int disttrain_gru(const Recurrence* r, const float* x, const float* w, const float* u, const float* b, float* y) {
    const int64_t n = r->units, row = 3 * n;
    if (!scratch.reserve(2 * bytes(r->rows() * row))) return 1;
    float *gates = scratch.take<float>(r->rows() * row), *from_h = scratch.take<float>(r->rows() * row);
    if (!multiply(r->rows(), row, r->features, {x, r->features, 1}, {w, row, 1}, gates, row, {b})) return 1;
    for (int64_t t = 0; t < r->steps; t++) {
        const float* h = t > 0 ? y + (t - 1) * n : nullptr;
        if (!multiply(r->samples, row, h ? n : 0, {h, r->steps * n, 1}, {u, row, 1}, from_h + t * row, r->steps * row,
                      {b + row}))
            return 1;
        gru_step(*r, t, gates, from_h, y);
    }
    return 0;
}

// x_g is null where nobody asks for it.
int disttrain_gru_gradients(const Recurrence* r, const float* g, const float* y, const float* x, const float* w,
                            const float* u, const float* b, float* x_g, float* w_g, float* u_g, float* b_g) {
    const int64_t n = r->units, row = 3 * n, steps = r->steps, rows = r->rows();
    if (!scratch.reserve(2 * bytes(rows * row) + bytes(rows * n) + bytes(r->samples * n))) return 1;
    float *gates = scratch.take<float>(rows * row), *from_h = scratch.take<float>(rows * row);
    float *before = scratch.take<float>(rows * n), *h_g = scratch.take<float>(r->samples * n);
    shift(*r, y, before);
    if (!multiply(rows, row, r->features, {x, r->features, 1}, {w, row, 1}, gates, row, {b}) ||
        !multiply(rows, row, n, {before, n, 1}, {u, row, 1}, from_h, row, {b + row}))
        return 1;
    for (int64_t t = 0; t < steps; t++) gru_step(*r, t, gates, from_h, nullptr);
    std::fill_n(h_g, r->samples * n, 0.0f);
    for (int64_t t = steps - 1; t >= 0; t--) {
        gru_step_back(*r, t, g, before, h_g, gates, from_h);
        if (t > 0 && !multiply(r->samples, n, row, {from_h + t * row, steps * row, 1}, {u, 1, row}, h_g, n,
                               {nullptr, false, true}))
            return 1;
    }
    sum_rows(rows, row, gates, b_g);
    sum_rows(rows, row, from_h, b_g + row);
    return !product_gradients(rows, r->features, row, gates, x, w, x_g, w_g) ||
           !product_gradients(rows, n, row, from_h, before, u, nullptr, u_g);
}

}  // extern "C"
