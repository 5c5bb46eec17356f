// weight * (x / sqrt(mean(x^2) + epsilon)) of rows of tokens; rounded before the product, too, where the weight is of
// the same type.
#pragma once

#include <type_traits>

#include "common.h"

// How rows lie in memory: `heads` of them `head_stride` numbers from one to the next, then the same `row_stride` further.
struct Rows {
    int64_t count = 1, heads = 1, row_stride = 0, head_stride = 0;

    int64_t at(int64_t row) const { return row / heads * row_stride + row % heads * head_stride; }
};

template <typename T, typename Weight>
void rms_norm(const Rows &rows, int64_t width, const T *x, const Weight *weight, float epsilon, T *out) {
#pragma omp parallel for if (rows.count * width > 100000)
    for (int64_t n = 0; n < rows.count; n++) {
        const T *in = x + rows.at(n);
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < width; d++) squares += float(in[d]) * float(in[d]);
        const float scale = 1 / std::sqrt(squares / width + epsilon);
#pragma omp simd
        for (int64_t d = 0; d < width; d++) {
            const float normed = float(in[d]) * scale;
            store(out[n * width + d],
                  (std::is_same_v<T, Weight> ? rounded<T>(normed) : normed) * float(weight[d]));
        }
    }
}
