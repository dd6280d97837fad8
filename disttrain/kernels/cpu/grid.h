// Images on a grid with borders, and a window that moves over it: what convolutions have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace disttrain {

// A convolution. As in disttrain/kernels/convolution.py.
struct Geometry {
    int64_t images, height, width, channels;  // of x
    int64_t kernel_height, kernel_width, filters;
    int64_t out_height, out_width;  // of y
    int64_t stride_down, stride_across;
    int64_t top, left;  // padding; at the bottom and right it follows from the size of y
};

constexpr int64_t GROUP_BYTES = 1 << 19;  // of images on their grid: half of a small L2 cache
constexpr int64_t GROUP_PLACES = 256;     // at least, where images are small, so that the kernel is read less often
constexpr int64_t SLACK = 16;             // floats behind a grid that a tile may read, and does not use

// Images on a grid with borders, and a window that moves over it.
struct Grid {
    int64_t height, width, channels;  // of an image
    int64_t top, left;                // of the border; negative: so many rows or columns are left out
    int64_t rows, columns;            // of the places of the window
    int64_t down, across;             // steps of the window
    int64_t window_height, window_width;

    int64_t grid_height() const { return (rows - 1) * down + window_height; }
    int64_t grid_width() const { return (columns - 1) * across + window_width; }
    int64_t line() const { return grid_width() * channels; }
    int64_t size() const { return grid_height() * line(); }
    int64_t places() const { return rows * columns; }
    int64_t run() const { return window_width * channels; }
    int64_t terms() const { return window_height * run(); }

    // Returns how many of `images` to treat together.
    int64_t group(int64_t images) const {
        int64_t wanted = (GROUP_PLACES + places() - 1) / places();
        int64_t fitting = GROUP_BYTES / (std::max<int64_t>(size(), 1) * static_cast<int64_t>(sizeof(float)));
        return std::max<int64_t>(1, std::min({images, wanted, fitting}));
    }

    // Copies `images` from x, dense, to `grid`, (images * size() + SLACK) floats.
    void fill(const float* x, int64_t images, float* grid) const {
        int64_t first = std::max<int64_t>(0, left), last = std::min(grid_width(), width + left);
        last = std::max(first, last);
        for (int64_t n = 0; n < images; n++) {
            for (int64_t r = 0; r < grid_height(); r++, grid += line()) {
                int64_t from = r - top;
                if (from < 0 || from >= height || first == last) {
                    std::fill(grid, grid + line(), 0.0f);
                    continue;
                }
                const float* source = x + ((n * height + from) * width + first - left) * channels;
                std::fill(grid, grid + first * channels, 0.0f);
                std::memcpy(grid + first * channels, source, (last - first) * channels * sizeof(float));
                std::fill(grid + last * channels, grid + line(), 0.0f);
            }
        }
        std::fill(grid, grid + SLACK, 0.0f);
    }

    // Writes where each place of `images` begins on the grid.
    void begins(int64_t images, int64_t* at) const {
        for (int64_t n = 0; n < images; n++)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t q = 0; q < columns; q++) *at++ = n * size() + r * down * line() + q * across * channels;
    }
};

inline Grid grid_of(const Geometry& g) {
    return {g.height, g.width, g.channels, g.top, g.left, g.out_height, g.out_width, g.stride_down, g.stride_across,
            g.kernel_height, g.kernel_width};
}

}  // namespace disttrain
