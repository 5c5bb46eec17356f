// x * cos + rotate_half(x) * sin for the first `turned` numbers of queries and keys; rounded where transformers rounds.
#pragma once

#include "common.h"

struct Heads {  // of queries or of keys, in numbers
    int64_t count, head_stride, token_stride;
};

template <typename T>
void rotate(const Heads &heads, int64_t token, int64_t width, int64_t turned, const T *x, const T *cos, const T *sin,
            T *out) {
    const int64_t half = turned / 2;
    for (int64_t head = 0; head < heads.count; head++) {
        const T *in = x + head * heads.head_stride + token * heads.token_stride;
        T *to = out + (token * heads.count + head) * width;
#pragma omp simd
        for (int64_t d = 0; d < half; d++) {
            const float left = float(in[d]), right = float(in[d + half]);
            store(to[d], rounded<T>(left * float(cos[d])) + rounded<T>(-right * float(sin[d])));
            store(to[d + half],
                  rounded<T>(right * float(cos[d + half])) + rounded<T>(left * float(sin[d + half])));
        }
        std::copy(in + turned, in + width, to + turned);
    }
}

template <typename T>
void rotary(int64_t tokens, int64_t width, int64_t turned, const Heads *heads, const T *query, const T *key,
            const T *cos, const T *sin, T *queries, T *keys) {
#pragma omp parallel for if (tokens * width * (heads[0].count + heads[1].count) > 100000)
    for (int64_t token = 0; token < tokens; token++) {
        rotate<T>(heads[0], token, width, turned, query, cos + token * turned, sin + token * turned, queries);
        rotate<T>(heads[1], token, width, turned, key, cos + token * turned, sin + token * turned, keys);
    }
}
