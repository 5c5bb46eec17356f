// Attention of single new tokens, each over the keys and values of its own row, where they lie in the cache.
//
// One task for each row and key head: it writes the new key and value, then reads the row's own keys and values once for
// each query head that shares them. No row is read further than its length, and none depends on its neighbours.
// The caller is decode_attention.py; layouts as in store.py.

#include <algorithm>
#include <cmath>
#include <vector>

#include "../../steer_ops/cpu/common.h"

namespace {

struct Call {  // what decode_attention.py fills in, in this order
    int64_t rows, heads, key_heads, key_width, value_width;
    int64_t window;                                   // how many tokens a token sees, itself included; 0: all
    int64_t query_head, query_token;                  // strides of the new tensors
    int64_t key_head, key_token, value_head, value_token;
};

struct Row {
    int64_t token;   // its place in the line of new tokens
    int64_t start;   // of its extent in the cache, in tokens
    int64_t size;    // of its extent
    int64_t length;  // tokens that it has, the new one included
};

// What will be needed soon is on its way to the core.
template <typename T>
inline void prefetch(const T *numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(numbers + i);
}

// WIDTH: of keys and values, where the compiler is to know it; 0: any, as the call says.
template <typename T, int WIDTH>
void attend(const Call &call, const Row *table, const T *query, const T *key, const T *value, T *keys, T *values,
            T *out, float scale, float cap, const float *sinks) {
    const int64_t groups = call.heads / call.key_heads, width = WIDTH ? WIDTH : call.key_width,
                  wide = WIDTH ? WIDTH : call.value_width;
    int64_t longest = 0;
    for (int64_t i = 0; i < call.rows; i++) longest = std::max(longest, table[i].length);

#pragma omp parallel
    {
        std::vector<float> scratch(longest + width + wide);
        float *scores = scratch.data(), *asked = scores + longest, *sum = asked + width;

#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < call.rows * call.key_heads; task++) {
            const Row row = table[task / call.key_heads];
            const int64_t shared = task % call.key_heads, line = row.start * call.key_heads + shared * row.size;
            const int64_t first = call.window ? std::max<int64_t>(0, row.length - call.window) : 0;
            const int64_t count = row.length - first;
            T *own_keys = keys + (line + first) * width, *own_values = values + (line + first) * wide;
            const T *new_key = key + shared * call.key_head + row.token * call.key_token;
            const T *new_value = value + shared * call.value_head + row.token * call.value_token;
            std::memcpy(own_keys + (count - 1) * width, new_key, width * sizeof(T));
            std::memcpy(own_values + (count - 1) * wide, new_value, wide * sizeof(T));

            for (int64_t head = shared * groups; head < (shared + 1) * groups; head++) {
                const T *q = query + head * call.query_head + row.token * call.query_token;
                for (int64_t d = 0; d < width; d++) asked[d] = float(q[d]) * scale;

                float most = sinks ? sinks[head] : -INFINITY;
                for (int64_t j = 0; j < count; j++) {
                    const T *k = own_keys + j * width;
                    prefetch(own_values + j * wide, wide);
                    float dot = 0;
#pragma omp simd reduction(+ : dot)
                    for (int64_t d = 0; d < width; d++) dot += asked[d] * float(k[d]);
                    if (cap != 0) dot = cap * std::tanh(dot / cap);
                    scores[j] = dot;
                    most = std::max(most, dot);
                }

                float total = sinks ? exponential(sinks[head] - most) : 0;
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < count; j++) {
                    scores[j] = exponential(scores[j] - most);
                    total += scores[j];
                }

                const auto weigh = [&](float *into) {
                    std::fill(into, into + wide, 0.0f);
                    for (int64_t j = 0; j < count; j++) {
                        const T *v = own_values + j * wide;
                        const float share = scores[j];
#pragma omp simd
                        for (int64_t d = 0; d < wide; d++) into[d] += share * float(v[d]);
                    }
                };
                if constexpr (WIDTH != 0) {
                    float registers[WIDTH];
                    weigh(registers);
                    std::copy(registers, registers + WIDTH, sum);
                } else {
                    weigh(sum);
                }
                T *o = out + (row.token * call.heads + head) * wide;
                for (int64_t d = 0; d < wide; d++) store(o[d], sum[d] / total);
            }
        }
    }
}

template <typename T, typename... Rest>
void dispatch(const Call &call, Rest... rest) {
    const int64_t width = call.key_width == call.value_width ? call.key_width : 0;
    const auto known = width == 64 ? attend<T, 64> : width == 128 ? attend<T, 128> : attend<T, 0>;
    known(call, rest...);
}

}  // namespace

#define ATTEND(NAME, T)                                                                                            \
    extern "C" void NAME(const Call *call, const Row *table, const T *query, const T *key, const T *value, T *keys, \
                         T *values, T *out, float scale, float cap, const float *sinks) {                           \
        dispatch<T>(*call, table, query, key, value, keys, values, out, scale, cap, sinks);                         \
    }

ATTEND(decode_attention_float32, float)
ATTEND(decode_attention_bfloat16, bfloat16)
