// Products of tokens with the weight of a linear layer, laid out in tiles of 32 outputs. The caller is tiled_linear.py.
//
// A weight is read from memory once for all tokens of a pass. Every output is summed in one order, whatever the number of
// tokens: what a token gets does not depend on its neighbours, not even in the last bit.

#include <immintrin.h>

#include <algorithm>

#include "native.h"

namespace {

const int64_t OUTPUTS = 32;  // of a tile
const int64_t UNITS = 1024;  // of a tile's inputs that are summed at a time: they stay in the core's cache
const int64_t TOKENS = 192;  // that one task computes

const int LANES = 16, GROUP = 12;  // as many sums as fit into AVX-512's registers: of 12 tokens, two vectors each
typedef float Lanes __attribute__((vector_size(64), aligned(4)));

// Inputs come in units of 32 bits: a float, or two bfloat16 that are multiplied at once.
struct Floats {
    typedef float Number, Unit;
    static void add(Lanes &sum, const float *weight, float x) { sum += *reinterpret_cast<const Lanes *>(weight) * x; }
};

#ifdef __AVX512BF16__
struct Pairs {
    typedef bfloat16 Number;
    typedef int32_t Unit;
    static void add(Lanes &sum, const int32_t *weight, int32_t x) {
        sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weight), (__m512bh)_mm512_set1_epi32(x));
    }
};
#endif

// Adds x [COUNT][units] times weight [units][OUTPUTS] to sums [COUNT][OUTPUTS].
template <typename Kind, int COUNT>
void multiply(const typename Kind::Unit *weight, const typename Kind::Unit *x, int64_t units, int64_t x_stride,
              float *sums) {
    Lanes lanes[COUNT][2] = {};
    for (int64_t i = 0; i < units; i++, weight += OUTPUTS) {
#pragma GCC unroll 12
        for (int n = 0; n < COUNT; n++) {
            Kind::add(lanes[n][0], weight, x[n * x_stride + i]);
            Kind::add(lanes[n][1], weight + LANES, x[n * x_stride + i]);
        }
    }
    for (int n = 0; n < COUNT; n++)
        for (int half = 0; half < 2; half++)
            *reinterpret_cast<Lanes *>(sums + n * OUTPUTS + half * LANES) += lanes[n][half];
}

template <typename Kind, int COUNT = GROUP>
void dispatch(int64_t tokens, const typename Kind::Unit *weight, const typename Kind::Unit *x, int64_t units,
              int64_t x_stride, float *sums) {
    if constexpr (COUNT > 0) {
        tokens == COUNT ? multiply<Kind, COUNT>(weight, x, units, x_stride, sums)
                        : dispatch<Kind, COUNT - 1>(tokens, weight, x, units, x_stride, sums);
    }
}

// weight [ceil(outputs / 32)][units][32], bias [outputs] or null, x [tokens][units] -> out [tokens][outputs]
template <typename Kind>
void linear(const typename Kind::Unit *weight, const typename Kind::Number *bias, const typename Kind::Unit *x,
            typename Kind::Number *out, int64_t tokens, int64_t units, int64_t outputs) {
    const int64_t tiles = (outputs + OUTPUTS - 1) / OUTPUTS, parts = (tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < tiles * parts; task++) {
        const int64_t tile = task / parts, begin = task % parts * TOKENS, count = std::min(TOKENS, tokens - begin);
        const int64_t groups = (count + GROUP - 1) / GROUP, each = (count + groups - 1) / groups;
        float sums[TOKENS * OUTPUTS];
        std::fill(sums, sums + count * OUTPUTS, 0.0f);
        for (int64_t i = 0; i < units; i += UNITS)
            for (int64_t n = 0; n < count; n += each)
                dispatch<Kind>(std::min(each, count - n), weight + (tile * units + i) * OUTPUTS,
                               x + (begin + n) * units + i, std::min(UNITS, units - i), units, sums + n * OUTPUTS);
        const int64_t first = tile * OUTPUTS, wide = std::min(OUTPUTS, outputs - first);
        for (int64_t n = 0; n < count; n++)
            for (int64_t d = 0; d < wide; d++)
                store(out[(begin + n) * outputs + first + d],
                      sums[n * OUTPUTS + d] + (bias ? float(bias[first + d]) : 0.0f));
    }
}

}  // namespace

extern "C" void tiled_linear_float32(const float *weight, const float *bias, const float *x, float *out, int64_t tokens,
                                     int64_t units, int64_t outputs) {
    linear<Floats>(weight, bias, x, out, tokens, units, outputs);
}

#ifdef __AVX512BF16__
extern "C" void tiled_linear_bfloat16(const int32_t *weight, const bfloat16 *bias, const int32_t *x, bfloat16 *out,
                                      int64_t tokens, int64_t units, int64_t outputs) {
    linear<Pairs>(weight, bias, x, out, tokens, units, outputs);
}
#endif
