// Calls kernels on arrays that are no byte larger than they must be, under sanitizers: see test_sanitizers.py.
//
// Reads lines from standard input: a name and the numbers of what it describes.
//   convolution images height width channels kernel_height kernel_width filters out_height out_width
//               stride_down stride_across top left
//   pooling     images height width channels out_height out_width window_height window_width
//               stride_down stride_across top left
//   flat        n
//   product     m n k a_row a_column b_row b_column
//   rows        rows length
//   attention   samples heads queries keys width value_width causal
//               mask_item mask_sample mask_head mask_query mask_key
//   recurrent   samples steps features units

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

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

struct Spread {
    int64_t inner, outer_step, inner_step;
};

struct Rows {
    int64_t count, length;
};

struct Attention {
    int64_t samples, heads, queries, keys, width, value_width, causal, item, sample, head, query, key;
};

struct Recurrence {
    int64_t samples, steps, features, units;
};

extern "C" {
int disttrain_lstm(const Recurrence*, const float*, const float*, const float*, const float*, float*);
int disttrain_lstm_gradients(const Recurrence*, const float*, const float*, const float*, const float*, const float*,
                             const float*, float*, float*, float*, float*);
int disttrain_gru(const Recurrence*, const float*, const float*, const float*, const float*, float*);
int disttrain_gru_gradients(const Recurrence*, const float*, const float*, const float*, const float*, const float*,
                            const float*, float*, float*, float*, float*);
int disttrain_matmul(const Products*, const float*, const float*, const float*, float*);
int disttrain_conv2d(const Geometry*, const float*, const float*, const float*, int64_t, float*);
int disttrain_attention(const Attention*, const float*, const float*, const float*, const char*, float*);
int disttrain_attention_gradients(const Attention*, const float*, const float*, const float*, const float*,
                                  const char*, float*, float*, float*);
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
void disttrain_silu(int64_t, const float*, float*);
void disttrain_silu_gradient(int64_t, const float*, const float*, float*);
void disttrain_softplus(int64_t, const float*, float*);
void disttrain_softplus_gradient(int64_t, const float*, const float*, float*);
void disttrain_batch_norm(int64_t, int64_t, const float*, const float*, const float*, const float*, const float*, float,
                          float*);
void disttrain_batch_norm_input(int64_t, int64_t, const float*, const float*, const float*, const float*, const float*,
                                const double*, float, float*);
void disttrain_channel_sums(int64_t, int64_t, const float*, double*);
void disttrain_cotangent_sums(int64_t, int64_t, const float*, const float*, const float*, double*);
void disttrain_square_sums(int64_t, int64_t, const float*, const float*, double*);
void disttrain_gelu(int64_t, int64_t, const float*, float*);
void disttrain_gelu_gradient(int64_t, int64_t, const float*, const float*, float*);
void disttrain_layer_norm(int64_t, int64_t, const float*, const float*, const float*, float, float*);
void disttrain_layer_norm_input(int64_t, int64_t, const float*, const float*, const float*, float, float*);
void disttrain_layer_norm_scale(int64_t, int64_t, const float*, const float*, float, float*);
void disttrain_softmax(int64_t, int64_t, const float*, float*);
void disttrain_softmax_gradient(int64_t, int64_t, const float*, const float*, float*);
void disttrain_log_softmax(int64_t, int64_t, const float*, float*);
void disttrain_log_softmax_gradient(int64_t, int64_t, const float*, const float*, float*);
void disttrain_softmax_cross_entropy(int64_t, int64_t, const float*, const float*, float*);
void disttrain_softmax_cross_entropy_gradient(int64_t, int64_t, const Spread*, const float*, const float*, const float*,
                                              float*);
int disttrain_sparse_softmax_cross_entropy(int64_t, int64_t, const float*, const int64_t*, float*);
int disttrain_sparse_softmax_cross_entropy_gradient(int64_t, int64_t, const Spread*, const float*, const float*,
                                                    const int64_t*, float*);
int disttrain_take_rows(int64_t, int64_t, int64_t, const int64_t*, const float*, float*);
int disttrain_add_rows(int64_t, int64_t, int64_t, const int64_t*, const float*, float*);
void disttrain_sum_rows(int64_t, int64_t, const float*, float*);
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
    disttrain_silu(n, g, m);
    disttrain_silu_gradient(n, g, m, v);
    disttrain_softplus(n, g, m);
    disttrain_softplus_gradient(n, g, m, v);
    for (int64_t approximate : {0, 1}) {
        disttrain_gelu(n, approximate, g, m);
        disttrain_gelu_gradient(n, approximate, g, m, v);
    }
}

static int rows(const Rows& r) {
    const int64_t n = r.length;
    Array x(r.count * n), g(r.count * n), y(r.count * n), gamma(n), beta(n), both(2 * n), losses(r.count), one(1);
    Array one_each(n);
    std::fill_n(one_each.data, n, 1.0f);
    disttrain_layer_norm(r.count, n, x, gamma, beta, 1e-3f, y);
    disttrain_layer_norm_input(r.count, n, g, x, gamma, 1e-3f, y);
    disttrain_layer_norm_scale(r.count, n, g, x, 1e-3f, both);
    std::vector<double> sums(n + 1), cotangents(2 * n + 1);
    disttrain_channel_sums(r.count, n, x, sums.data());
    disttrain_square_sums(r.count, n, x, gamma, sums.data());
    disttrain_cotangent_sums(r.count, n, g, x, gamma, cotangents.data());
    disttrain_batch_norm(r.count, n, x, beta, one_each, gamma, beta, 1e-3f, y);
    disttrain_batch_norm_input(r.count, n, g, x, beta, one_each, gamma, cotangents.data(), 1e-3f, y);
    disttrain_softmax(r.count, n, x, y);
    disttrain_softmax_gradient(r.count, n, g, x, y);
    disttrain_log_softmax(r.count, n, x, y);
    disttrain_log_softmax_gradient(r.count, n, g, x, y);
    const Spread dense{r.count ? r.count : 1, 0, 1}, single{1, 0, 0};
    disttrain_softmax_cross_entropy(r.count, n, x, g, losses);
    disttrain_softmax_cross_entropy_gradient(r.count, n, &dense, losses, x, g, y);
    disttrain_softmax_cross_entropy_gradient(r.count, n, &single, one, x, g, y);
    disttrain_sum_rows(r.count, n, x, gamma);
    std::vector<int64_t> labels(r.count, n - 1), far(r.count, n), negative(r.count, -n), low(r.count, -n - 1);
    int failed = 0;
    for (const auto* fine : {&labels, &negative}) {
        failed += disttrain_sparse_softmax_cross_entropy(r.count, n, x, fine->data(), losses);
        failed += disttrain_sparse_softmax_cross_entropy_gradient(r.count, n, &dense, losses, x, fine->data(), y);
    }
    failed += disttrain_add_rows(r.count, n, n, labels.data(), Array(r.count * n), Array(n * n));
    failed += disttrain_take_rows(r.count, n, n, labels.data(), Array(n * n), y);
    for (const auto* wrong : {&far, &low}) {
        const int expected = r.count > 0;
        failed += disttrain_sparse_softmax_cross_entropy(r.count, n, x, wrong->data(), losses) != expected;
        failed += disttrain_sparse_softmax_cross_entropy_gradient(r.count, n, &dense, losses, x, wrong->data(), y) !=
                  expected;
        failed += disttrain_add_rows(r.count, n, n, wrong->data(), x, Array(n * n)) != expected;
        failed += disttrain_take_rows(r.count, n, n, wrong->data(), Array(n * n), y) != expected;
    }
    return failed;
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

static int attention(const Attention& a) {
    const int64_t queries = a.samples * a.queries * a.heads, keys = a.samples * a.keys * a.heads;
    Array q(queries * a.width), k(keys * a.width), v(keys * a.value_width), y(queries * a.value_width);
    Array q_g(queries * a.width), k_g(keys * a.width), v_g(keys * a.value_width);
    const int64_t bytes = a.item + (a.samples - 1) * a.sample + (a.heads - 1) * a.head + (a.queries - 1) * a.query +
                          (a.keys - 1) * a.key;
    char* mask = a.item ? static_cast<char*>(std::calloc(bytes, 1)) : nullptr;
    const int failed = disttrain_attention(&a, q, k, v, mask, y) +
                       disttrain_attention_gradients(&a, y, q, k, v, mask, q_g, k_g, v_g);
    std::free(mask);
    return failed;
}

static int recurrent(const Recurrence& r) {
    const int64_t rows = r.samples * r.steps;
    Array x(rows * r.features), y(rows * r.units), g(rows * r.units), x_g(rows * r.features);
    int failed = 0;
    for (int64_t row : {4 * r.units, 3 * r.units}) {
        const bool lstm = row == 4 * r.units;
        Array w(r.features * row), u(r.units * row), b((lstm ? 1 : 2) * row);
        Array w_g(r.features * row), u_g(r.units * row), b_g((lstm ? 1 : 2) * row);
        auto back = lstm ? disttrain_lstm_gradients : disttrain_gru_gradients;
        failed += (lstm ? disttrain_lstm : disttrain_gru)(&r, x, w, u, b, y);
        failed += back(&r, g, y, x, w, u, b, x_g, w_g, u_g, b_g) + back(&r, g, y, x, w, u, b, nullptr, w_g, u_g, b_g);
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
        else if (name == "rows") failed += rows(read<Rows>());
        else if (name == "attention") failed += attention(read<Attention>());
        else if (name == "recurrent") failed += recurrent(read<Recurrence>());
        else return 2;
    }
    std::printf("%d lines\n", calls);
    return failed ? 3 : 0;
}
