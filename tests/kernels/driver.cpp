// Calls kernels on arrays that are no byte larger than they must be, under sanitizers: see test_sanitizers.py.
//
// Reads lines from standard input: a name and the numbers of what it describes.
//   convolution images height width channels kernel_height kernel_width filters out_height out_width
//               stride_down stride_across top left
//   pooling     images height width channels out_height out_width window_height window_width
//               stride_down stride_across top left
//   flat        n
//   product     m n k a_row a_column b_row b_column

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

struct Geometry {
    int64_t images, height, width, channels, kernel_height, kernel_width, filters, out_height, out_width, down, across,
        top, left;
};

struct Windows {
    int64_t images, height, width, channels, out_height, out_width, window_height, window_width, down, across, top, left;
};

struct Products {
    int64_t m, n, k, a_row, a_column, b_row, b_column, relu, precision, counts[4], a_steps[4], b_steps[4];
};

struct Product {
    int64_t m, n, k, a_row, a_column, b_row, b_column;
};

extern "C" {
int disttrain_matmul(const Products*, const float*, const float*, const float*, float*);
int disttrain_conv2d(const Geometry*, const float*, const float*, const float*, int64_t, float*);
int disttrain_conv2d_input(const Geometry*, const float*, const float*, float*);
int disttrain_conv2d_kernel(const Geometry*, const float*, const float*, float*);
int disttrain_winograd(const Geometry*, const float*, const float*, const float*, int64_t, float*);
int disttrain_winograd_input(const Geometry*, const float*, const float*, float*);
int disttrain_winograd_kernel(const Geometry*, const float*, const float*, float*);
void disttrain_max_pool2d(const Windows*, const float*, float*);
void disttrain_put_at_maximum(const Windows*, const float*, const float*, float*);
void disttrain_average_pool2d(const Windows*, const float*, float*);
void disttrain_spread(const Windows*, const float*, float*);
void disttrain_sgd(int64_t, float*, const float*, float);
void disttrain_momentum(int64_t, float*, const float*, float*, float, float);
void disttrain_nesterov(int64_t, float*, const float*, float*, float, float);
void disttrain_adam(int64_t, float*, const float*, float*, float*, float, float, float, float, float);
void disttrain_where_positive(int64_t, const float*, const float*, float*);
}

// An array of its own, aligned to 4 bytes and no more.
struct Array {
    char* memory;
    float* data;

    explicit Array(int64_t n) : memory(static_cast<char*>(std::malloc(n * 4 + 4))), data(nullptr) {
        data = reinterpret_cast<float*>(memory + 4);
        for (int64_t i = 0; i < n; i++) data[i] = static_cast<float>(i % 13 - 6) / 7;
    }
    Array(const Array&) = delete;
    ~Array() { std::free(memory); }
    operator float*() const { return data; }
};

static int convolution(const Geometry& g) {
    Array x(g.images * g.height * g.width * g.channels), y(g.images * g.out_height * g.out_width * g.filters);
    Array kernel(g.kernel_height * g.kernel_width * g.channels * g.filters), bias(g.filters);
    int failed = disttrain_conv2d(&g, x, kernel, bias, 1, y) + disttrain_conv2d(&g, x, kernel, nullptr, 0, y) +
                 disttrain_conv2d_input(&g, y, kernel, x) + disttrain_conv2d_kernel(&g, x, y, kernel);
    if (g.kernel_height != 3 || g.kernel_width != 3 || g.down != 1 || g.across != 1) return failed;
    return failed + disttrain_winograd(&g, x, kernel, bias, 1, y) + disttrain_winograd(&g, x, kernel, nullptr, 0, y) +
           disttrain_winograd_input(&g, y, kernel, x) + disttrain_winograd_kernel(&g, x, y, kernel);
}

static void pooling(const Windows& w) {
    int64_t large = w.images * w.height * w.width * w.channels;
    Array x(large), out(large), y(w.images * w.out_height * w.out_width * w.channels);
    disttrain_max_pool2d(&w, x, y);
    disttrain_put_at_maximum(&w, y, x, out);
    disttrain_average_pool2d(&w, x, y);
    disttrain_spread(&w, y, out);
}

static void flat(int64_t n) {
    Array w(n), g(n), m(n), v(n);
    disttrain_sgd(n, w, g, 0.1f);
    disttrain_momentum(n, w, g, v, 0.1f, 0.9f);
    disttrain_nesterov(n, w, g, v, 0.1f, 0.9f);
    disttrain_adam(n, w, g, m, v, 0.1f, 1.0f, 0.1f, 0.001f, 1e-7f);
    disttrain_where_positive(n, g, m, v);
}

// Every product twice, one behind the other; no array is larger than its last element asks for.
static int product(const Product& p) {
    const int64_t of_a = p.m && p.k ? (p.m - 1) * p.a_row + (p.k - 1) * p.a_column + 1 : 0;
    const int64_t of_b = p.k && p.n ? (p.k - 1) * p.b_row + (p.n - 1) * p.b_column + 1 : 0;
    Array a(2 * of_a), b(2 * of_b), bias(p.n), c(2 * p.m * p.n);
    int failed = 0;
    for (int64_t precision = 0; precision < 3; precision++) {
        Products both{p.m, p.n, p.k, p.a_row, p.a_column, p.b_row, p.b_column, 1, precision, {2, 1, 1, 1}, {of_a}, {of_b}};
        failed += disttrain_matmul(&both, a, b, bias, c);
    }
    return failed;
}

// Reads a struct of int64_t only.
template <typename T> static T read() {
    T made;
    int64_t* fields = reinterpret_cast<int64_t*>(&made);
    for (size_t i = 0; i < sizeof made / sizeof *fields; i++) std::cin >> fields[i];
    return made;
}

int main() {
    int failed = 0, calls = 0;
    for (std::string name; std::cin >> name; calls++) {
        if (name == "convolution") failed += convolution(read<Geometry>());
        else if (name == "pooling") pooling(read<Windows>());
        else if (name == "product") failed += product(read<Product>());
        else if (name == "flat") flat(read<int64_t>());
        else return 2;
    }
    std::printf("%d lines\n", calls);
    return failed ? 3 : 0;
}
