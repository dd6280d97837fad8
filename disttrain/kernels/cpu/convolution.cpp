// Convolution in two dimensions and its adjoint in the input, float32, channels last.
//
//   conv2d         y[n, p, q, f]  = sum over i, j, c of x[n, p * sh + i - top, q * sw + j - left, c] * k[i, j, c, f]
//                  then perhaps + bias[f], and max(y, 0)
//   conv2d_input   the adjoint in x: the same sum with the roles of x and y exchanged
//
// What one row i of the window sees of an image whose borders are filled up with zeros is one run of kw * c
// consecutive floats. So a convolution is a matrix product whose left rows need not be copied together (no im2col):
// a tile keeps TILE_ROWS places x 2 vectors of filters in registers and walks along the runs. A few images at a
// time are copied onto a grid with borders, small enough for the L2 cache.
//
// conv2d_input is, for each of the sh * sw phases of the strides, a convolution of stride 1 of the cotangent with every
// sh-th row and sw-th column of the kernel, turned round: no product with zeros between places, no scattered sums.
//
// Each element is a sum in one order, of i, j, c (for conv2d_input of i, j, f), whatever images are computed
// together and wherever they lie.
//
// Arrays are dense in C order, aligned to 4 bytes, and do not overlap. Source: Georganas et al., "Anatomy of
// high-performance deep learning convolutions on SIMD architectures", 2018, for tiles without im2col.

#include <atomic>
#include <limits>

#include "grid.h"
#include "parallel.h"
#include "scratch.h"
#include "tile.h"

using namespace disttrain;

namespace {

thread_local Scratch scratch, of_part;

// Where the results for the places of a grid go: distances in floats.
struct Target {
    float* base;
    int64_t image, row, column;
};

// Computes `count` <= ROWS rows of a product: row m is the sum over runs of from[m][...] * packed[...].
// packed: (runs * run, VECTORS * LANES), aligned to 64 bytes. to[m]: `filters` <= VECTORS * LANES floats.
template <int ROWS, int VECTORS>
void row_tile(const float* const* from, int64_t runs, int64_t run, int64_t line, const float* packed, float* const* to,
              int count, int64_t filters, const Epilogue& epilogue) {
    Vector sums[ROWS][VECTORS] = {};
    const float* rows[ROWS];
    for (int m = 0; m < ROWS; m++) rows[m] = from[m];
    for (int64_t i = 0; i < runs; i++) {
        for (int64_t k = 0; k < run; k++, packed += VECTORS * LANES) {
            Vector right[VECTORS];
            for (int v = 0; v < VECTORS; v++) right[v] = load(packed + v * LANES);
#pragma GCC unroll 16
            for (int m = 0; m < ROWS; m++) {
                Vector left = broadcast(rows[m][k]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[m][v] = multiply_add(left, right[v], sums[m][v]);
            }
        }
        for (int m = 0; m < ROWS; m++) rows[m] += line;
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
        if (m >= count) break;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const int64_t held = std::min(LANES, filters - v * LANES);
            Vector sum = sums[m][v];
            if (epilogue.bias) sum += load_first(epilogue.bias + v * LANES, held);
            if (epilogue.relu) sum = relu(sum);
            if (held == LANES) store(to[m] + v * LANES, sum);
            else store_first(to[m] + v * LANES, sum, held);
        }
    }
}

// Computes the products of all places of a group with one panel of `filters` <= WIDE filters.
// skipping: leaves out rows of the window that see nothing but border, where `images` is one image.
void panel(const Grid& grid, const float* images, const int64_t* begins, const float* packed, float* base,
           const int64_t* ends, int64_t count, int64_t filters, const Epilogue& epilogue, bool skipping) {
    const float* from[TILE_ROWS];
    float* to[TILE_ROWS];
    const bool wide = filters > LANES;
    auto compute = wide ? row_tile<TILE_ROWS, 2> : row_tile<TILE_ROWS, 1>;
    const int64_t of_row = grid.run() * (wide ? WIDE : LANES);
    for (int64_t first = 0; first < count; first += TILE_ROWS) {
        int held = static_cast<int>(std::min<int64_t>(TILE_ROWS, count - first));
        int64_t begin = 0, end = grid.window_height;
        if (skipping) {
            int64_t above = first / grid.columns * grid.down, below = (first + held - 1) / grid.columns * grid.down;
            begin = std::min(end, std::max(begin, grid.top - below));
            end = std::max(begin, std::min(end, grid.top + grid.height - above));
        }
        for (int m = 0; m < TILE_ROWS; m++) {
            int64_t place = first + std::min(m, held - 1);  // the last row again, where there is none
            from[m] = images + begins[place] + begin * grid.line();
            to[m] = base + ends[place];
        }
        compute(from, end - begin, grid.run(), grid.line(), packed + begin * of_row, to, held, filters,
                epilogue);
    }
}

// Returns the floats of a kernel of `terms` x `filters` in panels of WIDE filters, the last one perhaps of LANES.
int64_t packed_size(int64_t terms, int64_t filters) { return terms * ((filters + LANES - 1) / LANES) * LANES; }

// Packs a kernel: panel by panel, the filters of each term together. at(term) gives the first filter of a term,
// `step` the distance to the next.
template <typename At> void pack(int64_t terms, int64_t filters, int64_t step, At at, float* packed) {
    for (int64_t f = 0; f < filters; f += WIDE) {
        int64_t held = std::min(WIDE, filters - f), wide = held > LANES ? WIDE : LANES;
        for (int64_t t = 0; t < terms; t++, packed += wide) {
            const float* from = at(t) + f * step;
            for (int64_t v = 0; v < held; v++) packed[v] = from[v * step];
            for (int64_t v = held; v < wide; v++) packed[v] = 0.0f;
        }
    }
}

// Convolves images on `grid` with a kernel that pack() has packed. skipping: as in panel(), for images that are treated
// alone in any batch: of which rows a tile consists would else follow from the batch, and with them where 0 * inf is
// added. Groups of images are divided among threads. False where there is no memory.
bool convolve(const Grid& grid, const float* x, int64_t images, const float* packed, int64_t filters,
              const Target& target, const Epilogue& epilogue, int64_t* begins, int64_t* ends, bool skipping) {
    int64_t group = grid.group(images);
    std::atomic<bool> has_memory{true};
    skipping = skipping && grid.group(std::numeric_limits<int64_t>::max()) == 1;
    grid.begins(group, begins);
    for (int64_t n = 0, at = 0; n < group; n++)
        for (int64_t r = 0; r < grid.rows; r++)
            for (int64_t q = 0; q < grid.columns; q++)
                ends[at++] = n * target.image + r * target.row + q * target.column;
    parallel(divided_up(images, group), 1, [&](int64_t begin, int64_t end) {
        if (!of_part.reserve((group * grid.size() + SLACK) * sizeof(float))) {
            has_memory = false;
            return;
        }
        float* copied = of_part.take<float>(group * grid.size() + SLACK);
        for (int64_t n = begin * group; n < std::min(images, end * group); n += group) {
            int64_t held = std::min(group, images - n);
            grid.fill(x + n * grid.height * grid.width * grid.channels, held, copied);
            const float* part = packed;
            for (int64_t f = 0; f < filters; f += WIDE) {
                int64_t wide = std::min(WIDE, filters - f);
                Epilogue of_panel = epilogue;
                if (of_panel.bias) of_panel.bias += f;
                panel(grid, copied, begins, part, target.base + n * target.image + f, ends, held * grid.places(),
                      wide, of_panel, skipping);
                part += grid.terms() * (wide > LANES ? WIDE : LANES);
            }
        }
    });
    return has_memory;
}

// Reserves scratch for convolve(); false where there is no memory.
bool reserve(const Grid& grid, int64_t images, int64_t filters) {
    int64_t group = grid.group(images);
    int64_t bytes = Scratch::rounded(packed_size(grid.terms(), filters) * sizeof(float));
    return scratch.reserve(bytes + 2 * Scratch::rounded(group * grid.places() * sizeof(int64_t)));
}

// One dimension of a phase of conv2d_input: which elements of x, and which rows of the kernel, meet.
struct Phase {
    int64_t first, count;  // of x: first, first + stride, ...
    int64_t rows;          // of the kernel: phase, phase + stride, ...
    int64_t before;        // border before the cotangent

    Phase(int64_t phase, int64_t length, int64_t window, int64_t stride, int64_t padding) {
        first = ((phase - padding) % stride + stride) % stride;
        count = first < length ? (length - 1 - first) / stride + 1 : 0;
        rows = phase < window ? (window - 1 - phase) / stride + 1 : 0;
        before = rows - 1 - (first + padding - phase) / stride;
    }
};

}  // namespace

extern "C" {

// x: (images, height, width, channels), kernel: (kernel_height, kernel_width, channels, filters),
// bias: (filters) or null, y: (images, out_height, out_width, filters), written. Returns 0; 1 where there is no memory.
int disttrain_conv2d(const Geometry* g, const float* x, const float* kernel, const float* bias, int64_t relu,
                     float* y) {
    Grid grid = grid_of(*g);
    if (!reserve(grid, g->images, g->filters)) return 1;
    int64_t group = grid.group(g->images), filters = g->filters;
    float* packed = scratch.take<float>(packed_size(grid.terms(), filters));
    int64_t* begins = scratch.take<int64_t>(group * grid.places());
    int64_t* ends = scratch.take<int64_t>(group * grid.places());
    pack(grid.terms(), filters, 1, [&](int64_t term) { return kernel + term * filters; }, packed);
    Target target{y, grid.places() * filters, grid.columns * filters, filters};
    return !convolve(grid, x, g->images, packed, filters, target, {bias, relu != 0}, begins, ends, false);
}

// cotangent: as y, kernel: as in disttrain_conv2d, x: written. Returns 0; 1 where there is no memory.
int disttrain_conv2d_input(const Geometry* g, const float* cotangent, const float* kernel, float* x) {
    for (int64_t a = 0; a < g->stride_down; a++) {
        Phase down(a, g->height, g->kernel_height, g->stride_down, g->top);
        for (int64_t b = 0; b < g->stride_across; b++) {
            Phase across(b, g->width, g->kernel_width, g->stride_across, g->left);
            if (down.count == 0 || across.count == 0) continue;
            Grid grid{g->out_height, g->out_width, g->filters, down.before, across.before, down.count, across.count,
                      1, 1, down.rows, across.rows};
            if (!reserve(grid, g->images, g->channels)) return 1;
            int64_t group = grid.group(g->images);
            float* packed = scratch.take<float>(packed_size(grid.terms(), g->channels));
            int64_t* begins = scratch.take<int64_t>(group * grid.places());
            int64_t* ends = scratch.take<int64_t>(group * grid.places());
            auto turned = [&](int64_t term) {
                int64_t filter = term % g->filters, place = term / g->filters;
                int64_t i = a + (down.rows - 1 - place / across.rows) * g->stride_down;
                int64_t j = b + (across.rows - 1 - place % across.rows) * g->stride_across;
                return kernel + (i * g->kernel_width + j) * g->channels * g->filters + filter;
            };
            pack(grid.terms(), g->channels, g->filters, turned, packed);
            int64_t line = g->width * g->channels;
            Target target{x + down.first * line + across.first * g->channels, g->height * line,
                          g->stride_down * line, g->stride_across * g->channels};
            if (!convolve(grid, cotangent, g->images, packed, g->channels, target, {}, begins, ends, true)) return 1;
        }
    }
    return 0;
}

}  // extern "C"
