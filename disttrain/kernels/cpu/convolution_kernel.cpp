// The adjoint of convolution in its kernel, float32, channels last.
//
//   conv2d_kernel  k[i, j, c, f] = sum over n, p, q of x[n, p * sh + i - top, q * sw + j - left, c] * g[n, p, q, f]
//
// What one row i of the window sees is one run of kw * c consecutive floats, as in convolution.cpp. A tile keeps
// DEEP_ROWS floats of a run x 2 vectors of filters in registers and walks over places.
//
// Each element is the sum of CHUNK places, then of those sums, in the order of n, p, q; where images are small, several
// share a chunk. Which those are follows from the shapes alone.
//
// Arrays are dense in C order, aligned to 4 bytes, and do not overlap.

#include <atomic>

#include "grid.h"
#include "parallel.h"
#include "scratch.h"
#include "tile.h"

using namespace disttrain;

namespace {

constexpr int64_t CHUNK = 128;       // places summed in registers before memory is added to; their g stays in L1

thread_local Scratch scratch;

// Adds to `sums`, (ROWS, step) floats of which `rows` x `filters` are used, the products of `count` places.
// x + begins[p]: ROWS floats are read. g: VECTORS * LANES floats are read for each place, `line` apart.
template <int ROWS, int VECTORS>
void deep_tile(const float* x, const int64_t* begins, const float* g, int64_t line, int64_t count, float* sums,
               int64_t step, int64_t rows, int64_t filters) {
    Vector held[ROWS][VECTORS] = {};
    for (int64_t p = 0; p < count; p++, g += line) {
        const float* left = x + begins[p];
        Vector right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load(g + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
            Vector each = broadcast(left[m]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) held[m][v] = multiply_add(each, right[v], held[m][v]);
        }
    }
    float row[VECTORS * LANES];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
        if (m >= rows) break;
        float* to = sums + m * step;
        if (filters == VECTORS * LANES) {
            for (int v = 0; v < VECTORS; v++) store(to + v * LANES, load(to + v * LANES) + held[m][v]);
        } else {
            for (int v = 0; v < VECTORS; v++) store(row + v * LANES, held[m][v]);
            for (int64_t f = 0; f < filters; f++) to[f] += row[f];
        }
    }
}

// Adds the products of `count` <= CHUNK places with VECTORS * LANES filters to all rows of the kernel's gradient.
template <int VECTORS>
void deep_panel(const Grid& grid, const float* x, const int64_t* begins, const float* g, int64_t line, int64_t count,
                float* sums, int64_t step, int64_t filters) {
    for (int64_t i = 0; i < grid.window_height; i++, x += grid.line()) {
        for (int64_t k = 0; k < grid.run();) {
            int64_t left = grid.run() - k;
            float* to = sums + (i * grid.run() + k) * step;
            if (left > 2 * DEEP_REST) {
                deep_tile<DEEP_ROWS, VECTORS>(x + k, begins, g, line, count, to, step, left, filters);
                k += DEEP_ROWS;
            } else {
                deep_tile<DEEP_REST, VECTORS>(x + k, begins, g, line, count, to, step, left, filters);
                k += DEEP_REST;
            }
        }
    }
}

// Computes the adjoint for the filters from `first` to `last`; false where there is no memory.
bool of_filters(const Geometry& g, const Grid& grid, const float* x, const float* cotangent, float* kernel,
                int64_t first, int64_t last) {
    int64_t group = grid.group(g.images), filters = g.filters;
    int64_t bytes = Scratch::rounded((group * grid.size() + SLACK) * sizeof(float)) +
                    Scratch::rounded(CHUNK * WIDE * sizeof(float)) +
                    Scratch::rounded(group * grid.places() * sizeof(int64_t));
    if (!scratch.reserve(bytes)) return false;
    float* copied = scratch.take<float>(group * grid.size() + SLACK);
    float* narrow = scratch.take<float>(CHUNK * WIDE);
    int64_t* begins = scratch.take<int64_t>(group * grid.places());
    grid.begins(group, begins);
    for (int64_t t = 0; t < grid.terms(); t++)
        std::fill(kernel + t * filters + first, kernel + t * filters + last, 0.0f);
    for (int64_t n = 0; n < g.images; n += group) {
        int64_t held = std::min(group, g.images - n), places = held * grid.places();
        grid.fill(x + n * g.height * g.width * g.channels, held, copied);
        const float* of_group = cotangent + n * grid.places() * filters;
        for (int64_t p = 0; p < places; p += CHUNK) {
            int64_t count = std::min(CHUNK, places - p);
            for (int64_t f = first; f < last; f += WIDE) {
                int64_t wide = std::min(WIDE, filters - f), line = filters;
                const float* part = of_group + p * filters + f;
                if (wide % LANES != 0) {  // a whole vector would reach behind the array
                    line = wide > LANES ? WIDE : LANES;
                    for (int64_t r = 0; r < count; r++) {
                        std::memcpy(narrow + r * line, part + r * filters, wide * sizeof(float));
                        std::fill(narrow + r * line + wide, narrow + (r + 1) * line, 0.0f);
                    }
                    part = narrow;
                }
                auto compute = wide > LANES ? deep_panel<2> : deep_panel<1>;
                compute(grid, copied, begins + p, part, line, count, kernel + f, filters, wide);
            }
        }
    }
    return true;
}

}  // namespace

extern "C" {

// x: (images, height, width, channels), cotangent: (images, out_height, out_width, filters),
// kernel: (kernel_height, kernel_width, channels, filters), written. Returns 0; 1 where there is no memory.
int disttrain_conv2d_kernel(const Geometry* g, const float* x, const float* cotangent, float* kernel) {
    const Grid grid = grid_of(*g);
    std::atomic<bool> has_memory{true};
    parallel(divided_up(g->filters, WIDE), 1, [&](int64_t begin, int64_t end) {
        if (!of_filters(*g, grid, x, cotangent, kernel, begin * WIDE, std::min(g->filters, end * WIDE)))
            has_memory = false;
    });
    return !has_memory;
}

}  // extern "C"
