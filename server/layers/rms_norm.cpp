// weight * (x / sqrt(mean(x^2) + epsilon)) of rows of tokens; rounded where transformers rounds. The caller is rms_norm.py.

#include <cmath>

#include "native.h"

namespace {

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

}  // namespace

#define RMS_NORM(NAME, T)                                                                                      \
    extern "C" void NAME(int64_t rows, int64_t width, const T *x, const T *weight, float epsilon, T *out) {    \
        rms_norm<T>(rows, width, x, weight, epsilon, out);                                                     \
    }

RMS_NORM(rms_norm_float32, float)
RMS_NORM(rms_norm_bfloat16, bfloat16)
