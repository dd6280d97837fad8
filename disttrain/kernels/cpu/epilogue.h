// What happens to a vector of a product before it is written.
#pragma once

#include "matmul.h"
#include "vector.h"

namespace disttrain {

inline Vector relu(Vector v) { return Vector{} > v ? Vector{} : v; }  // in this order NaN stays

// Writes `count` <= LANES elements of a row of c. bias: of those columns, where there is one.
inline void finish(Vector sum, float* c, int64_t count, const float* bias, const Epilogue& epilogue) {
    if (epilogue.add) sum = load_first(c, count) + sum;
    if (bias) sum += load_first(bias, count);
    if (epilogue.relu) sum = relu(sum);
    store_first(c, sum, count);
}

}  // namespace disttrain
