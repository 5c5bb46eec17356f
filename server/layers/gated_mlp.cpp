// silu(gate) * up of tokens, gates and ups side by side; rounded where transformers rounds. The caller is gated_mlp.py.

#include "native.h"

namespace {

template <typename T>
void gated_mlp(int64_t tokens, int64_t width, const T *x, T *out) {
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

}  // namespace

#define GATED_MLP(NAME, T)                                                       \
    extern "C" void NAME(int64_t tokens, int64_t width, const T *x, T *out) {    \
        gated_mlp<T>(tokens, width, x, out);                                     \
    }

GATED_MLP(gated_mlp_float32, float)
GATED_MLP(gated_mlp_bfloat16, bfloat16)
