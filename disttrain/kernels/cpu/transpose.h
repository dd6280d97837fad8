// A square of LANES vectors, transposed in registers.
#pragma once

#include <utility>

#include "vector.h"

namespace disttrain {

// Exchanges, in each square of 2 D by 2 D floats, the upper right quarter with the lower left one.
template <int64_t D, int64_t... I> inline void exchange(Vector& a, Vector& b, std::integer_sequence<int64_t, I...>) {
    Vector upper = __builtin_shufflevector(a, b, (I & D ? LANES + I - D : I)...);
    b = __builtin_shufflevector(a, b, (I & D ? LANES + I : I + D)...);
    a = upper;
}

// Source: Eklundh, "A fast computer method for matrix transposing", 1972.
template <int64_t D = LANES / 2> inline void transpose(Vector (&rows)[LANES]) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; i++)
        if (!(i & D)) exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int64_t, LANES>());
    if constexpr (D > 1) transpose<D / 2>(rows);
}

}  // namespace disttrain
