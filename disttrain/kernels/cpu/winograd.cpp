// Convolution with windows of 3 x 3 and stride 1 in fewer products, float32, channels last: Winograd's F(2 x 2, 3 x 3).
//
// A tile of 2 x 2 results y of a filter comes from 4 x 4 places of x:
//
//   y = A' [ sum over c of (G k G') * (B' x B) ] A        ' transposes, * is element by element
//
//        1  0 -1  0          1    0    0
//   B' = 0  1  1  0     G = 1/2  1/2  1/2     A' = 1  1  1  0
//        0 -1  1  0         1/2 -1/2  1/2          0  1 -1 -1
//        0  1  0 -1          0    0    1
//
// which takes 16 products for each channel where the definition takes 36. For each of the 16 positions the sum over
// channels is a product of matrices, (tiles, c) x (c, filters). The adjoint in x is such a convolution of the cotangent,
// with kernels turned round; the adjoint in the kernel is  k = G' [ sum over tiles of (B' x B) * (A g A') ] G.
//
// A few tiles at a time are transformed, so that they stay in the L2 cache. Where a tile reaches beyond an image it
// reads zeros, and what it computes there is not stored.
//
// Each element is a sum in one order, whatever tiles are computed together: of c within each position; in the adjoint
// in the kernel of a block of tiles, then of those sums, where blocks follow from the shapes. A number that is not finite makes all results of its tiles so.
//
// Arrays are dense in C order, aligned to 4 bytes, and do not overlap. Source: Lavin & Gray, "Fast algorithms for
// convolutional neural networks", 2015.

#include <atomic>

#include "grid.h"
#include "parallel.h"
#include "scratch.h"
#include "tile.h"
#include "transpose.h"

using namespace disttrain;

namespace {

constexpr int64_t POSITIONS = 16;
constexpr int64_t TILES = 42;      // of a block: a multiple of the rows of most tiles of a product
constexpr int64_t LEAST_SUM = 64;  // tiles of a sum in the adjoint in the kernel
constexpr int64_t MOST_SUM = 256;

thread_local Scratch scratch, of_part;

// The five transforms of a line. `step`: between a line's elements.
struct Data {  // B'
    static constexpr int FROM = 4, TO = 4;
    static void line(const Vector* x, int s, Vector* to, int t) {
        to[0] = x[0] - x[2 * s];
        to[t] = x[s] + x[2 * s];
        to[2 * t] = x[2 * s] - x[s];
        to[3 * t] = x[s] - x[3 * s];
    }
};

struct Kernel {  // G
    static constexpr int FROM = 3, TO = 4;
    static void line(const Vector* k, int s, Vector* to, int t) {
        Vector ends = k[0] + k[2 * s];
        to[0] = k[0];
        to[t] = 0.5f * (ends + k[s]);
        to[2 * t] = 0.5f * (ends - k[s]);
        to[3 * t] = k[2 * s];
    }
};

struct Result {  // A'
    static constexpr int FROM = 4, TO = 2;
    static void line(const Vector* m, int s, Vector* to, int t) {
        to[0] = m[0] + m[s] + m[2 * s];
        to[t] = m[s] - m[2 * s] - m[3 * s];
    }
};

struct Cotangent {  // A
    static constexpr int FROM = 2, TO = 4;
    static void line(const Vector* g, int s, Vector* to, int t) {
        to[0] = g[0];
        to[t] = g[0] + g[s];
        to[2 * t] = g[0] - g[s];
        to[3 * t] = -g[s];
    }
};

struct KernelCotangent {  // G'
    static constexpr int FROM = 4, TO = 3;
    static void line(const Vector* u, int s, Vector* to, int t) {
        to[0] = u[0] + 0.5f * (u[s] + u[2 * s]);
        to[t] = 0.5f * (u[s] - u[2 * s]);
        to[2 * t] = u[3 * s] + 0.5f * (u[s] + u[2 * s]);
    }
};

// Transforms the columns and then the rows of a square.
template <typename T> inline void transform(const Vector* from, Vector* to) {
    Vector half[T::TO * T::FROM];
#pragma GCC unroll 4
    for (int j = 0; j < T::FROM; j++) T::line(from + j, T::FROM, half + j, T::FROM);
#pragma GCC unroll 4
    for (int i = 0; i < T::TO; i++) T::line(half + i * T::FROM, 1, to + i * T::TO, 1);
}

int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Images, and the squares on them that tiles begin with: tile (p, q) at (2 p - top, 2 q - left).
template <typename Number> struct Images {
    Number* data;
    int64_t height, width, channels;
    int64_t top, left;

    // Gives the addresses of the SIDE x SIDE places of a tile of image n; `outside` for those that are not on the image.
    template <int SIDE> void places(int64_t n, int64_t p, int64_t q, Number* outside, Number** to) const {
        const int64_t row = 2 * p - top, column = 2 * q - left, line = width * channels;
        if (row >= 0 && column >= 0 && row + SIDE <= height && column + SIDE <= width) {
            Number* first = data + ((n * height + row) * width + column) * channels;
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++) to[i * SIDE + j] = first + i * line + j * channels;
            return;
        }
        for (int64_t r = row; r < row + SIDE; r++) {
            for (int64_t c = column; c < column + SIDE; c++) {
                const bool inside = r >= 0 && c >= 0 && r < height && c < width;
                *to++ = inside ? data + ((n * height + r) * width + c) * channels : outside;
            }
        }
    }
};

// The tiles of all images, in order; walks from one to the next.
struct Tiles {
    int64_t images, down, across;
    int64_t n = 0, p = 0, q = 0;

    Tiles(int64_t images, int64_t height, int64_t width)
        : images(images), down((height + 1) / 2), across((width + 1) / 2) {}
    int64_t count() const { return images * down * across; }
    void next() {
        if (++q == across) q = 0, p++;
        if (p == down) p = 0, n++;
    }
    Tiles after(int64_t count) const {
        Tiles made = *this;
        const int64_t tile = (n * down + p) * across + q + count;
        made.n = tile / (down * across), made.p = tile / across % down, made.q = tile % across;
        return made;
    }
};

// Asks for the memory of `count` tiles while other work is done, spread over `calls` calls: a tile's lines are too far
// apart for a processor to guess. Of SIDE x SIDE places the last 2 x 2: the others belong to tiles before.
template <int SIDE, typename Number> struct Fetch {
    Images<Number> images;
    Tiles tiles;
    int64_t count, calls;
    int64_t channels = images.channels;
    int64_t call = 0, asked = 0;

    void operator()() {
        Number* places[SIDE * SIDE];
        for (call++; asked * calls < count * call; asked++, tiles.next()) {
            images.template places<SIDE>(tiles.n, tiles.p, tiles.q, nullptr, places);
            for (int i = SIDE - 2; i < SIDE; i++)
                for (int j = SIDE - 2; j < SIDE; j++)
                    for (int64_t c = 0; places[i * SIDE + j] && c < channels; c += CACHE_LINE / 4)
                        __builtin_prefetch(places[i * SIDE + j] + c);
        }
    }
};

// Transformed tiles: for each position a matrix of (tiles, channels). A row begins at a multiple of 64 bytes.
struct Planes {
    float* data;
    int64_t row, plane;

    // One more vector a row: rows would else fall on few sets of the L1 cache.
    static int64_t pitch(int64_t channels) { return whole(channels) + CACHE_LINE / 4; }
    static int64_t size(int64_t tiles, int64_t channels) {
        return POSITIONS * (tiles * pitch(channels) + CACHE_LINE / 4) + SLACK;
    }
    Planes(float* data, int64_t tiles, int64_t channels)
        : data(data), row(pitch(channels)), plane(tiles * row + CACHE_LINE / 4) {}
    float* at(int64_t position, int64_t tile) const { return data + position * plane + tile * row; }
};

// Transforms the next tiles to rows first ... last - 1. zeros: `x.channels` of them. The rest of a last vector is zeros.
template <typename T>
void transform_tiles(Tiles tiles, const Images<const float>& x, int64_t first, int64_t last, const float* zeros,
                     const Planes& planes) {
    const float* from[T::FROM * T::FROM];
    for (int64_t m = first; m < last; m++, tiles.next()) {
        x.template places<T::FROM>(tiles.n, tiles.p, tiles.q, zeros, from);
        float* to = planes.at(0, m);
        for (int64_t c = 0; c < x.channels; c += LANES) {
            Vector square[T::FROM * T::FROM], made[POSITIONS];
            int64_t held = std::min(LANES, x.channels - c);
            if (held == LANES) {
#pragma GCC unroll 16
                for (int i = 0; i < T::FROM * T::FROM; i++) square[i] = load(from[i] + c);
            } else {
                for (int i = 0; i < T::FROM * T::FROM; i++) square[i] = load_first(from[i] + c, held);
            }
            transform<T>(square, made);
#pragma GCC unroll 16
            for (int64_t t = 0; t < POSITIONS; t++) store(to + t * planes.plane + c, made[t]);
        }
    }
}

// Transforms a kernel of (3, 3, channels, filters), or for its adjoint one of (3, 3, filters, channels) turned round, to
// panels of WIDE filters, the last perhaps of LANES: of each the 16 positions, (channels, WIDE).
void pack(const float* kernel, int64_t channels, int64_t filters, bool turned, float* packed) {
    Vector square[9][LANES];  // of each place of the window, a few channels x filters
    for (int64_t f = 0; f < filters; f += LANES) {
        int64_t panel = f / WIDE * WIDE, wide = filters - panel > LANES ? WIDE : LANES;
        float* of_filters = packed + POSITIONS * channels * panel + f - panel;
        int64_t width = std::min(LANES, filters - f);
        for (int64_t c = 0; c < channels; c += LANES) {
            int64_t depth = std::min(LANES, channels - c);
            for (int i = 0; i < 9; i++) {
                if (turned) {
                    const float* from = kernel + ((8 - i) * filters + f) * channels + c;
                    for (int64_t b = 0; b < LANES; b++)
                        square[i][b] = b < width ? load_first(from + b * channels, depth) : Vector{};
                    transpose(square[i]);
                } else {
                    const float* from = kernel + (i * channels + c) * filters + f;
                    for (int64_t a = 0; a < depth; a++) square[i][a] = load_first(from + a * filters, width);
                }
            }
            for (int64_t a = 0; a < depth; a++) {
                Vector from[9], made[POSITIONS];
                for (int i = 0; i < 9; i++) from[i] = square[i][a];
                transform<Kernel>(from, made);
                for (int64_t t = 0; t < POSITIONS; t++) store(of_filters + (t * channels + c + a) * wide, made[t]);
            }
        }
    }
}

// Transforms the products of `filters` <= WIDE filters back.
void put_results(Tiles tiles, const Images<float>& y, int64_t count, const Planes& products, int64_t filters,
                 const Epilogue& epilogue) {
    float* to[4];
    for (int64_t m = 0; m < count; m++, tiles.next()) {
        y.places<2>(tiles.n, tiles.p, tiles.q, nullptr, to);
        for (int64_t f = 0; f < filters; f += LANES) {
            Vector from[POSITIONS], made[4];
#pragma GCC unroll 16
            for (int64_t t = 0; t < POSITIONS; t++) from[t] = load(products.at(t, m) + f);
            transform<Result>(from, made);
            const int64_t held = std::min(LANES, filters - f);
            const Vector bias = epilogue.bias ? load_first(epilogue.bias + f, held) : Vector{};
            for (int i = 0; i < 4; i++) {
                if (!to[i]) continue;
                if (epilogue.bias) made[i] += bias;
                if (epilogue.relu) made[i] = relu(made[i]);
                if (held == LANES) store(to[i] + f, made[i]);
                else store_first(to[i] + f, made[i], held);
            }
        }
    }
}

// Computes y from x for tiles first ... last - 1; false where there is no memory.
// packed: by pack(). zeros: `x.channels` of them.
bool convolve(const Tiles& all, int64_t first, int64_t last, const Images<const float>& x, const Images<float>& y,
              const float* packed, const float* zeros, const Epilogue& epilogue) {
    const int64_t of_data = Planes::size(TILES, x.channels), of_products = Planes::size(TILES, WIDE);
    if (!of_part.reserve((of_data + of_products) * sizeof(float))) return false;
    const Planes data(of_part.take<float>(of_data), TILES, x.channels);
    const Planes products(of_part.take<float>(of_products), TILES, WIDE);
    const int64_t panels = divided_up(y.channels, WIDE);
    Tiles tiles = all.after(first);
    for (int64_t count; first < last; first += count) {
        count = std::min(TILES, last - first);
        const int64_t parts = divided_up(count, PRODUCT_ROWS), rows = divided_up(count, parts);
        const Tiles following = tiles.after(count);
        Fetch<4, const float> ahead{x, following, std::min(TILES, last - first - count), POSITIONS * parts * panels};
        transform_tiles<Data>(tiles, x, 0, count, zeros, data);
        for (int64_t f = 0; f < y.channels; f += WIDE) {
            const int64_t held = std::min(WIDE, y.channels - f), wide = held > LANES ? WIDE : LANES;
            Images<float> panel = y;
            panel.data += f;
            Epilogue of_panel = epilogue;
            if (of_panel.bias) of_panel.bias += f;
            Fetch<2, float> results{panel, tiles, count, POSITIONS * parts, held};
            for (int64_t t = 0; t < POSITIONS; t++) {
                const float* right = packed + (POSITIONS * f + t * wide) * x.channels;
                for (int64_t m = 0; m < count; m += rows) {
                    const int64_t height = std::min(rows, count - m);
                    tile_of(height, wide)(x.channels, {data.at(t, m), data.row, 1}, right, wide, products.at(t, m),
                                          products.row, wide, {});
                    results();
                    ahead();
                }
            }
            put_results(tiles, panel, count, products, held, of_panel);
        }
        tiles = following;
    }
    return true;
}

int convolve_all(int64_t images, const Images<const float>& x, const Images<float>& y, const float* kernel,
                 bool turned, const Epilogue& epilogue) {
    const Tiles tiles(images, y.height, y.width);
    const int64_t packed_size = POSITIONS * x.channels * whole(y.channels);
    if (!scratch.reserve(Scratch::rounded(packed_size * sizeof(float)) + Scratch::rounded(x.channels * sizeof(float))))
        return 1;
    float* packed = scratch.take<float>(packed_size);
    float* zeros = scratch.take<float>(x.channels);
    std::fill(zeros, zeros + x.channels, 0.0f);
    pack(kernel, x.channels, y.channels, turned, packed);
    std::atomic<bool> failed{false};
    parallel(divided_up(tiles.count(), TILES), 1, [&](int64_t begin, int64_t end) {
        if (!convolve(tiles, begin * TILES, std::min(end * TILES, tiles.count()), x, y, packed, zeros, epilogue))
            failed = true;
    });
    return failed;
}

}  // namespace

extern "C" {

// As disttrain_conv2d, for windows of 3 x 3 and strides of 1.
int disttrain_winograd(const Geometry* g, const float* x, const float* kernel, const float* bias, int64_t relu,
                       float* y) {
    return convolve_all(g->images, {x, g->height, g->width, g->channels, g->top, g->left},
                    {y, g->out_height, g->out_width, g->filters, 0, 0}, kernel, false, {bias, relu != 0});
}

// As disttrain_conv2d_input, for windows of 3 x 3 and strides of 1.
int disttrain_winograd_input(const Geometry* g, const float* cotangent, const float* kernel, float* x) {
    return convolve_all(g->images, {cotangent, g->out_height, g->out_width, g->filters, 2 - g->top, 2 - g->left},
                    {x, g->height, g->width, g->channels, 0, 0}, kernel, true, {});
}

// As disttrain_conv2d_kernel, for windows of 3 x 3 and strides of 1.
int disttrain_winograd_kernel(const Geometry* g, const float* x, const float* cotangent, float* kernel) {
    Tiles tiles(g->images, g->out_height, g->out_width);
    const Images<const float> left{x, g->height, g->width, g->channels, g->top, g->left};
    const Images<const float> right{cotangent, g->out_height, g->out_width, g->filters, 0, 0};
    const int64_t channels = g->channels, filters = g->filters, line = whole(filters);
    // so many that as much is moved of sums as of transformed tiles
    const int64_t block = std::max(LEAST_SUM, std::min(MOST_SUM, channels * filters / (channels + filters)));
    const int64_t most = std::max(channels, filters);
    const int64_t floats[] = {Planes::size(block, channels), Planes::size(block, filters), most,
                              POSITIONS * channels * line};
    int64_t bytes = 0;
    for (int64_t each : floats) bytes += Scratch::rounded(each * sizeof(float));
    if (!scratch.reserve(bytes)) return 1;
    const Planes data(scratch.take<float>(floats[0]), block, channels);
    const Planes cotangents(scratch.take<float>(floats[1]), block, filters);
    float* zeros = scratch.take<float>(floats[2]);
    float* sums = scratch.take<float>(floats[3]);
    std::fill(zeros, zeros + most, 0.0f);
    if (tiles.count() == 0) std::fill(sums, sums + floats[3], 0.0f);
    const int64_t parts = divided_up(channels, PRODUCT_ROWS), rows = divided_up(channels, parts);
    for (int64_t first = 0, count; first < tiles.count(); first += count, tiles = tiles.after(count)) {
        count = std::min(block, tiles.count() - first);
        parallel(count, 1, [&](int64_t begin, int64_t end) {
            transform_tiles<Data>(tiles.after(begin), left, begin, end, zeros, data);
            transform_tiles<Cotangent>(tiles.after(begin), right, begin, end, zeros, cotangents);
        });
        const Tiles following = tiles.after(count);
        const int64_t ahead = std::min(block, tiles.count() - first - count);
        parallel(POSITIONS, 1, [&](int64_t begin, int64_t end) {
            const int64_t skipped = ahead * begin / POSITIONS, share = ahead * end / POSITIONS - skipped;
            const int64_t calls = (end - begin) * divided_up(line, WIDE) * parts;
            Fetch<4, const float> next_data{left, following.after(skipped), share, calls};
            Fetch<2, const float> next_cotangents{right, following.after(skipped), share, calls};
            for (int64_t t = begin; t < end; t++) {
                for (int64_t f = 0; f < line; f += WIDE) {
                    const int64_t wide = std::min(WIDE, line - f);
                    for (int64_t c = 0; c < channels; c += rows) {
                        const int64_t height = std::min(rows, channels - c);
                        tile_of(height, wide)(count, {data.at(t, 0) + c, 1, data.row}, cotangents.at(t, 0) + f,
                                              cotangents.row, sums + (t * channels + c) * line + f, line, wide,
                                              {nullptr, false, first > 0});
                        next_data();
                        next_cotangents();
                    }
                }
            }
        });
    }
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t f = 0; f < filters; f += LANES) {
            Vector from[POSITIONS], made[9];
            for (int64_t t = 0; t < POSITIONS; t++) from[t] = load(sums + (t * channels + c) * line + f);
            transform<KernelCotangent>(from, made);
            for (int64_t i = 0; i < 9; i++)
                store_first(kernel + (i * channels + c) * filters + f, made[i], std::min(LANES, filters - f));
        }
    }
    return 0;
}

}  // extern "C"
