// silu(gate) * up of tokens, gates and ups side by side; rounded where transformers rounds.
#pragma once

#include "common.h"

template <typename T>
void silu_mul(int64_t tokens, int64_t width, const T *x, T *out) {
#pragma omp parallel for if (tokens * width > 100000)
    for (int64_t n = 0; n < tokens; n++) {
        const T *gate = x + 2 * n * width, *up = gate + width;
#pragma omp simd
        for (int64_t d = 0; d < width; d++) {
            const float g = std::max(float(gate[d]), -88.0f);  // below, the exponential is too much
            store(out[n * width + d], rounded<T>(g / (1 + exponential(-g))) * float(up[d]));
        }
    }
}
