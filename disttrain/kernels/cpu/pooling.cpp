// Pooling over windows, float32, channels last, and the gradients.
//
//   max_pool2d      y[n, p, q, c] = maximum of the window at (p, q); padding is -inf
//   put_at_maximum  its gradient: each window's g at the window's first maximum, 0 elsewhere
//   average_pool2d  the mean of those elements of the window that are not padding
//   spread          its gradient: each window's g, divided among those elements
//
// Shapes: x (images, height, width, channels), y and g (images, out_height, out_width, channels), dense in C order,
// aligned to 4 bytes; they do not overlap.
//
// To the bit what the definitions in disttrain/autodiff/ops/pooling.py give, with NaN as there: a window with a NaN has
// no maximum. Where windows overlap, definitions add for each place in the window in turn; that is the order of windows
// from the last to the first.

#include <algorithm>
#include <limits>
#include <type_traits>

#include "parallel.h"
#include "vector.h"

using namespace disttrain;

// As in disttrain/kernels/pooling.py.
struct Windows {
    int64_t images, height, width, channels;
    int64_t out_height, out_width;
    int64_t window_height, window_width;
    int64_t stride_down, stride_across;
    int64_t top, left;
};

namespace {

// The same code for a vector of channels and for a single one.
template <typename T> struct Lanes;

template <> struct Lanes<Vector> {
    typedef decltype(Vector{} == Vector{}) Mask;
    static constexpr int64_t count = LANES;
    static Vector get(const float* p) { return load(p); }
    static void put(float* p, Vector v) { store(p, v); }
    static Vector all(float value) { return broadcast(value); }
    static Mask every() { return ~Mask{}; }
};

template <> struct Lanes<float> {
    typedef bool Mask;
    static constexpr int64_t count = 1;
    static float get(const float* p) { return *p; }
    static void put(float* p, float v) { *p = v; }
    static float all(float value) { return value; }
    static Mask every() { return true; }
};

// One window, cut where padding begins.
struct Window {
    int64_t row, column;  // of its first element; may be padding
    int64_t first_row, last_row, first_column, last_column;

    Window(const Windows& w, int64_t p, int64_t q)
        : row(p * w.stride_down - w.top), column(q * w.stride_across - w.left),
          first_row(std::max<int64_t>(row, 0)), last_row(std::min(row + w.window_height, w.height)),
          first_column(std::max<int64_t>(column, 0)), last_column(std::min(column + w.window_width, w.width)) {}

    int64_t elements() const {
        return std::max<int64_t>(last_row - first_row, 0) * std::max<int64_t>(last_column - first_column, 0);
    }
    bool holds(int64_t r, int64_t q) const {
        return r >= first_row && r < last_row && q >= first_column && q < last_column;
    }
};

// Returns the maximum of some channels of a window of `image`; NaN where there is one.
// SIDE: height and width of a window that is known to be whole; 0: they are found out.
template <typename T, int SIDE> T maximum(const Windows& w, const Window& at, const float* image) {
    const int64_t rows = SIDE ? SIDE : at.last_row - at.first_row;
    const int64_t columns = SIDE ? SIDE : at.last_column - at.first_column;
    const int64_t step = w.channels, line = w.width * step;
    const float* from = image + at.first_row * line + at.first_column * step;
    T most = Lanes<T>::all(-std::numeric_limits<float>::infinity());
    for (int64_t r = 0; r < rows; r++, from += line)
        for (int64_t q = 0; q < columns; q++) {
            T value = Lanes<T>::get(from + q * step);
            most = (value > most) | (value != value) ? value : most;
        }
    return most;
}

template <typename T, int SIDE>
void put_one(const Windows& w, const Window& at, const float* image, const float* g, float* out) {
    typedef Lanes<T> L;
    const int64_t rows = SIDE ? SIDE : w.window_height, columns = SIDE ? SIDE : w.window_width;
    const int64_t step = w.channels, line = w.width * step;
    const T none = L::all(-std::numeric_limits<float>::infinity());
    T most = maximum<T, SIDE>(w, at, image), share = L::get(g);
    typename L::Mask open = L::every();
    for (int64_t r = 0; r < rows; r++)
        for (int64_t q = 0; q < columns; q++) {
            if (!SIDE && !at.holds(at.row + r, at.column + q)) {
                open = open & (most != none);  // padding is the first where all is as small as it
                continue;
            }
            int64_t place = (at.row + r) * line + (at.column + q) * step;
            typename L::Mask first = (L::get(image + place) == most) & open;
            open = open ^ first;
            // a product, not a choice: NaN * 0 is NaN, as in the definition
            L::put(out + place, L::get(out + place) + share * (first ? L::all(1.0f) : L::all(0.0f)));
        }
}

template <typename T> T total(const Windows& w, const Window& at, const float* image) {
    T sum = Lanes<T>::all(0.0f);
    for (int64_t r = at.first_row; r < at.last_row; r++)
        for (int64_t q = at.first_column; q < at.last_column; q++)
            sum = sum + Lanes<T>::get(image + (r * w.width + q) * w.channels);
    return sum;
}

template <typename T> void spread_one(const Windows& w, const Window& at, T share, float* out) {
    for (int64_t r = at.first_row; r < at.last_row; r++)
        for (int64_t q = at.first_column; q < at.last_column; q++) {
            float* to = out + (r * w.width + q) * w.channels;
            Lanes<T>::put(to, Lanes<T>::get(to) + share);
        }
}

// Calls `each`, for a vector or a float, for all channels: with the channel and a value of that type.
template <typename Each> void for_channels(const Windows& w, Each each) {
    int64_t c = 0;
    for (; c + LANES <= w.channels; c += LANES) each(c, Vector{});
    for (; c < w.channels; c++) each(c, 0.0f);
}

// Calls `each` for all windows of image `n`, from the last to the first: with the window, the place of its result, and
// its SIDE, a constant.
template <typename Each> void for_windows(const Windows& w, int64_t n, Each each) {
    const bool two = w.window_height == 2 && w.window_width == 2;
    for (int64_t p = w.out_height - 1; p >= 0; p--)
        for (int64_t q = w.out_width - 1; q >= 0; q--) {
            Window at(w, p, q);
            int64_t result = ((n * w.out_height + p) * w.out_width + q) * w.channels;
            if (two && at.elements() == 4) each(at, result, std::integral_constant<int, 2>());
            else each(at, result, std::integral_constant<int, 0>());
        }
}

// Calls `each` for all images, divided among threads.
template <typename Each> void for_images(const Windows& w, Each each) {
    parallel(w.images, 1, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) each(n);
    });
}

int64_t image_size(const Windows& w) { return w.height * w.width * w.channels; }

}  // namespace

extern "C" {

void disttrain_max_pool2d(const Windows* w, const float* x, float* y) {
    for_images(*w, [=](int64_t n) {
        const float* image = x + n * image_size(*w);
        for_windows(*w, n, [&](const Window& at, int64_t to, auto side) {
            for_channels(*w, [&](int64_t c, auto kind) {
                typedef decltype(kind) T;
                Lanes<T>::put(y + to + c, maximum<T, decltype(side)::value>(*w, at, image + c));
            });
        });
    });
}

void disttrain_put_at_maximum(const Windows* w, const float* g, const float* x, float* out) {
    for_images(*w, [=](int64_t n) {
        const float* image = x + n * image_size(*w);
        float* into = out + n * image_size(*w);
        std::fill(into, into + image_size(*w), 0.0f);
        for_windows(*w, n, [&](const Window& at, int64_t from, auto side) {
            for_channels(*w, [&](int64_t c, auto kind) {
                put_one<decltype(kind), decltype(side)::value>(*w, at, image + c, g + from + c, into + c);
            });
        });
    });
}

void disttrain_average_pool2d(const Windows* w, const float* x, float* y) {
    for_images(*w, [=](int64_t n) {
        const float* image = x + n * image_size(*w);
        for_windows(*w, n, [&](const Window& at, int64_t to, auto) {
            float elements = static_cast<float>(at.elements());
            for_channels(*w, [&](int64_t c, auto kind) {
                typedef decltype(kind) T;
                Lanes<T>::put(y + to + c, total<T>(*w, at, image + c) / Lanes<T>::all(elements));
            });
        });
    });
}

void disttrain_spread(const Windows* w, const float* g, float* out) {
    for_images(*w, [=](int64_t n) {
        float* into = out + n * image_size(*w);
        std::fill(into, into + image_size(*w), 0.0f);
        for_windows(*w, n, [&](const Window& at, int64_t from, auto) {
            float elements = static_cast<float>(at.elements());
            for_channels(*w, [&](int64_t c, auto kind) {
                typedef Lanes<decltype(kind)> L;
                spread_one(*w, at, L::get(g + from + c) / L::all(elements), into + c);
            });
        });
    });
}

}  // extern "C"
