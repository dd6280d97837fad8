// The matrix product, float32, for the op and for kernels that are made of products.
#pragma once

#include <cstdint>

namespace disttrain {

// A matrix where it lies: element (i, j) is data[i * row + j * column]. Any distances, also those of a transpose;
// fast where one of them is 1. Aligned to 4 bytes; read only where it has elements.
struct Matrix {
    const float* data;
    int64_t row, column;
};

// What happens to a product before it is written.
struct Epilogue {
    const float* bias = nullptr;  // one float per column of c, added; or none
    bool relu = false;
    bool add = false;  // to what c holds; else c is only written
    const float* ahead = nullptr;  // what is fetched into the cache meanwhile: a line there, the next `ahead_step` on, ...
    int64_t ahead_step = 0;
};

// How exactly: as in disttrain/kernels/precision.py. Without matrix units all of them compute in float32.
enum class Precision : int64_t { highest, high, medium };

// Computes c[i * c_row + j] = act(sum over p of a(i, p) * b(p, j) + bias[j]) for i < m, j < n, p < k; false where
// there is no memory. c does not overlap what is read.
//
// The bits of an element follow from its row of a, its column of b, k, precision, bias and what c held, whatever else is computed
// with it and wherever it lies. NaN and infinity arrive as in the definition, with relu too.
bool multiply(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row,
              const Epilogue& epilogue = {}, Precision precision = Precision::highest);

// The two ways to do so: in float32, and by matrix units, where the sources are compiled for them and the first product
// shows that they are there and do what is believed of them.
bool tiles_work();
bool multiply_by_vectors(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row,
                         const Epilogue& epilogue);
bool multiply_by_tiles(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_row,
                       const Epilogue& epilogue, Precision precision);

}  // namespace disttrain
