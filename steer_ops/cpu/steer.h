// Gated steering (`steer` in plain.py): gates, delta and the return to the norm in one pass over each token.
#pragma once

#include <vector>

#include "common.h"

struct Steer {
    int64_t tokens, columns, width;
    int64_t token;       // stride of the activations
    int64_t multiplier;  // stride of the multipliers
    int64_t gate;        // stride of the gates that were read elsewhere
    int64_t owner;       // tokens of this owner are counted
};

enum Gate : int8_t { SIGMOID, CONSTANT, LINEAR, COSINE, READ };  // as in plain.py

const float SMALLEST_NORM = 1e-19f;  // as in plain.py

inline float norm(const float *a, int64_t width) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < width; d++) squares += a[d] * a[d];
    return std::sqrt(squares);
}

inline float dot(const float *a, const float *b, int64_t width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; d++) sum += a[d] * b[d];
    return sum;
}

inline void add(float *moved, float strength, const float *vector, int64_t width) {
#pragma omp simd
    for (int64_t d = 0; d < width; d++) moved[d] += strength * vector[d];
}

template <typename T>
void steer(const Steer &call, const T *activations, T *out, const float *vectors, const float *weights,
           const float *biases, const int8_t *kinds, const bool *keep_norm, const float *clamps,
           const float *multipliers, const float *opened, const int32_t *owners, int64_t *counts) {
    const int64_t width = call.width;
#pragma omp parallel if (call.tokens * width > 100000)
    {
        std::vector<float> scratch(2 * width + call.columns);
        float *a = scratch.data(), *moved = a + width, *strengths = moved + width;
#pragma omp for
        for (int64_t n = 0; n < call.tokens; n++) {
            const T *in = activations + n * call.token;
            const float *m = multipliers + n * call.multiplier;
            counts[n] += owners[n] == call.owner;
            if (std::all_of(m, m + call.columns, [](float one) { return one == 0; })) {
                std::memcpy(out + n * width, in, width * sizeof(T));
                continue;
            }
            for (int64_t d = 0; d < width; d++) moved[d] = a[d] = float(in[d]);
            const float before = norm(a, width);
            bool acts = false;
            for (int64_t c = 0; c < call.columns; c++) {
                strengths[c] = 0;
                if (m[c] == 0) continue;
                float gate = 1;
                if (kinds[c] == READ) {
                    gate = opened[n * call.gate + c];
                } else if (kinds[c] != CONSTANT) {
                    const float overlap = dot(a, weights + c * width, width);
                    gate = overlap + biases[c];
                    if (kinds[c] == SIGMOID) gate = 1 / (1 + std::exp(-gate));
                    if (kinds[c] == COSINE) gate = overlap / std::max(before, SMALLEST_NORM) + biases[c] > 0;
                }
                const float value = clamps[2 * c], origin = clamps[2 * c + 1];
                float amount = m[c];
                if (!std::isnan(value)) amount = origin + amount * value - dot(a, vectors + c * width, width);
                strengths[c] = gate * amount;
                acts |= strengths[c] != 0;
                if (keep_norm[c]) add(moved, strengths[c], vectors + c * width, width);
            }
            if (!acts) {
                std::memcpy(out + n * width, in, width * sizeof(T));
                continue;
            }
            const float after = norm(moved, width);
            const bool finite = before < INFINITY && after < INFINITY;
            const float rescale = finite ? before / std::max(after, SMALLEST_NORM) : 1;
            for (int64_t d = 0; d < width; d++) moved[d] *= rescale;
            for (int64_t c = 0; c < call.columns; c++)
                if (m[c] != 0 && !keep_norm[c]) add(moved, strengths[c], vectors + c * width, width);
            for (int64_t d = 0; d < width; d++) store(out[n * width + d], moved[d]);
        }
    }
}
