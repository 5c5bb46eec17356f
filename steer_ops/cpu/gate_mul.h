// gate(x) * up of tokens, gates and ups side by side; rounded where transformers rounds.
#pragma once

#include "common.h"

inline float silu(float x) {
    x = std::max(x, -88.0f);  // below, the exponential is too much
    return x / (1 + exponential(-x));
}

inline float gelu_tanh(float x) {
    x = std::max(x, -20.0f);  // below it is nothing
    // (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
    return x / (1 + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

template <typename T, float (*GATE)(float)>
void gate_mul(int64_t tokens, int64_t width, const T *x, T *out) {
#pragma omp parallel for if (tokens * width > 100000)
    for (int64_t n = 0; n < tokens; n++) {
        const T *gate = x + 2 * n * width, *up = gate + width;
#pragma omp simd
        for (int64_t d = 0; d < width; d++) store(out[n * width + d], rounded<T>(GATE(float(gate[d]))) * float(up[d]));
    }
}
