// weight * (x / sqrt(mean(x^2) + epsilon)) of rows of tokens; rounded where transformers rounds.
#pragma once

#include "common.h"

template <typename T>
void rms_norm(int64_t rows, int64_t width, const T *x, const T *weight, float epsilon, T *out) {
#pragma omp parallel for if (rows * width > 100000)
    for (int64_t n = 0; n < rows; n++) {
        const T *in = x + n * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < width; d++) squares += float(in[d]) * float(in[d]);
        const float scale = 1 / std::sqrt(squares / width + epsilon);
#pragma omp simd
        for (int64_t d = 0; d < width; d++) {
            T rounded;
            store(rounded, float(in[d]) * scale);
            store(out[n * width + d], float(rounded) * float(weight[d]));
        }
    }
}
