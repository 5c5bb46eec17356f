// Products of tokens with the weight of a linear layer, laid out in tiles of 32 outputs. For CPUs with AVX2 or AVX-512.
//
// A weight is read from memory once for all tokens of a pass. Every output is summed in one order, whatever the number of
// tokens: what a token gets does not depend on its neighbours, not even in the last bit.

#pragma once

#include <immintrin.h>

#include "common.h"

const int64_t OUTPUTS = 32;  // of a tile
const int64_t UNITS = 1024;  // of a tile's inputs that are summed at a time: they stay in the core's cache
const int64_t TOKENS = 192;  // that one task computes

// As many sums as fit into the registers: of GROUP tokens, VECTORS each.
#ifdef __AVX512F__
const int LANES = 16, GROUP = 12;
#else
const int LANES = 8, GROUP = 3;
#endif
const int VECTORS = OUTPUTS / LANES;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));

// Inputs come in units of 32 bits: a float, or two bfloat16.
struct Floats {
    typedef float Number, Unit;
    static void add(Lanes &sum, const float *weight, float x) { sum += *reinterpret_cast<const Lanes *>(weight) * x; }
};

struct Pairs {
    typedef bfloat16 Number;
    typedef int32_t Unit;
    static void add(Lanes &sum, const int32_t *weight, int32_t x) {
#ifdef __AVX512BF16__
        sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weight), (__m512bh)_mm512_set1_epi32(x));
#else
        const Bits both = *reinterpret_cast<const Bits *>(weight), given = Bits{} + uint32_t(x), high = Bits{} + 0xffff0000;
        sum += (Lanes)(both << 16) * (Lanes)(given << 16);
        sum += (Lanes)(both & high) * (Lanes)(given & high);
#endif
    }
};

// Adds x [COUNT][units] times weight [units][OUTPUTS] to sums [COUNT][OUTPUTS].
template <typename Kind, int COUNT>
void multiply(const typename Kind::Unit *weight, const typename Kind::Unit *x, int64_t units, int64_t x_stride,
              float *sums) {
    Lanes lanes[COUNT][VECTORS] = {};
    for (int64_t i = 0; i < units; i++, weight += OUTPUTS) {
#pragma GCC unroll 12
        for (int n = 0; n < COUNT; n++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) Kind::add(lanes[n][v], weight + v * LANES, x[n * x_stride + i]);
    }
    for (int n = 0; n < COUNT; n++)
        for (int v = 0; v < VECTORS; v++)
            *reinterpret_cast<Lanes *>(sums + n * OUTPUTS + v * LANES) += lanes[n][v];
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
void tiled_linear(const typename Kind::Unit *weight, const typename Kind::Number *bias, const typename Kind::Unit *x,
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
