// Products of tokens with the weight of a linear layer, laid out in tiles of 32 outputs. The caller is tiled_linear.py.
//
// A weight is read from memory once for all tokens of a pass. Every output is summed in one order, whatever the number of
// tokens: what a token gets does not depend on its neighbours, not even in the last bit.

#include <algorithm>

#include "native.h"

namespace {

const int64_t OUTPUTS = 32;   // of a tile
const int64_t INPUTS = 1024;  // of a tile that are summed at a time: they stay in the core's cache
const int64_t TOKENS = 192;   // that one task computes

const int LANES = 16, GROUP = 12;  // as many sums as fit into AVX-512's registers: of 12 tokens, two vectors each
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

struct Part {  // a tile's weights [inputs][OUTPUTS] and what they are multiplied with
    const float *weight, *x;
    int64_t inputs, x_stride;
    float *out;
    int64_t out_stride, outputs;
    const float *bias;
    bool first;  // sums begin here
};

template <int COUNT>
void multiply(const Part &part) {
    Lanes sums[COUNT][2] = {};
    const float *weight = part.weight;
    for (int64_t i = 0; i < part.inputs; i++, weight += OUTPUTS) {
        const Lanes left = *reinterpret_cast<const Lanes *>(weight);
        const Lanes right = *reinterpret_cast<const Lanes *>(weight + LANES);
#pragma GCC unroll 12
        for (int n = 0; n < COUNT; n++) {
            const float x = part.x[n * part.x_stride + i];
            sums[n][0] += left * x;
            sums[n][1] += right * x;
        }
    }
    for (int n = 0; n < COUNT; n++) {
        float row[OUTPUTS], *out = part.out + n * part.out_stride;
        std::memcpy(row, sums[n], sizeof row);
        for (int64_t d = 0; d < part.outputs; d++)
            out[d] = row[d] + (part.first ? part.bias ? part.bias[d] : 0 : out[d]);
    }
}

template <int COUNT = GROUP>
void dispatch(int64_t tokens, const Part &part) {
    if constexpr (COUNT > 0) {
        tokens == COUNT ? multiply<COUNT>(part) : dispatch<COUNT - 1>(tokens, part);
    }
}

}  // namespace

// weight [ceil(outputs / 32)][inputs][32], bias [outputs] or null, x [tokens][inputs] -> out [tokens][outputs]
extern "C" void tiled_linear_float32(const float *weight, const float *bias, const float *x, float *out, int64_t tokens,
                                     int64_t inputs, int64_t outputs) {
    const int64_t tiles = (outputs + OUTPUTS - 1) / OUTPUTS, parts = (tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < tiles * parts; task++) {
        const int64_t tile = task / parts, begin = task % parts * TOKENS, end = std::min(tokens, begin + TOKENS);
        const int64_t groups = (end - begin + GROUP - 1) / GROUP, each = (end - begin + groups - 1) / groups;
        for (int64_t i = 0; i < inputs; i += INPUTS)
            for (int64_t n = begin; n < end; n += each)
                dispatch(std::min(each, end - n),
                         Part{weight + (tile * inputs + i) * OUTPUTS, x + n * inputs + i, std::min(INPUTS, inputs - i),
                              inputs, out + n * outputs + tile * OUTPUTS, outputs,
                              std::min(OUTPUTS, outputs - tile * OUTPUTS), bias ? bias + tile * OUTPUTS : nullptr, i == 0});
    }
}
