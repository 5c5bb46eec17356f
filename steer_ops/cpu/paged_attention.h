// Decode attention over block tables: one new token for each row, over the keys and values of its own row.
//
// A task is some key heads of one row. Its keys and values are read in the order in which they lie in memory, block
// after block and in a block head after head, and by all query heads that share them one right after the other. No row
// is read further than its length, and no number of a row depends on other rows or on how heads are shared out.
#pragma once

#include <omp.h>

#include <vector>

#include "common.h"

struct PagedAttention {
    int64_t rows, heads, key_heads, key_width, value_width;
    int64_t block_size;
    int64_t table;   // stride of a row of the block tables
    int64_t window;  // how many tokens a token sees, itself included; 0: all
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;  // strides of the new tensors
    float scale, softcap;                                                     // softcap 0: none
};

const int64_t TASKS = 8;  // for each thread, at least, where there are so many heads: rows are not equally long

// Asks for memory that will be needed soon.
template <typename T>
inline void prefetch(const T *numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(numbers + i);
}

// Scores of the tokens whose keys lie at `k`; returns the highest of them and of `most`.
template <typename T>
inline float score_tokens(const float *__restrict query, const T *__restrict k, const T *__restrict v, int64_t tokens,
                          int64_t width, int64_t value_width, float softcap, float most, float *__restrict scores) {
    for (int64_t j = 0; j < tokens; j++, k += width, v += value_width) {
        prefetch(v, value_width);
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < width; d++) dot += query[d] * float(k[d]);
        if (softcap != 0) dot = softcap * std::tanh(dot / softcap);
        scores[j] = dot;
        most = std::max(most, dot);
    }
    return most;
}

// sum += shares x values. WIDTH: of a value, where the compiler is to know it and keep the sum in registers.
template <typename T, int WIDTH>
inline void add_values(const float *__restrict shares, const T *__restrict v, int64_t tokens, int64_t value_width,
                       float *__restrict sum) {
    float registers[WIDTH ? WIDTH : 1];
    float *into = WIDTH ? registers : sum;
    if (WIDTH) std::copy(sum, sum + WIDTH, registers);
    for (int64_t j = 0; j < tokens; j++, v += value_width) {
        const float share = shares[j];
#pragma omp simd
        for (int64_t d = 0; d < value_width; d++) into[d] += share * float(v[d]);
    }
    if (WIDTH) std::copy(registers, registers + WIDTH, sum);
}

// WIDTH: of keys and values, where the compiler is to know it; 0: any, as `call` says.
template <typename T, int WIDTH>
void attend(const PagedAttention &call, const T *query, const T *key, const T *value, T *key_cache, T *value_cache,
            const int32_t *block_tables, const int32_t *context_lens, T *out, const float *sinks) {
    const int64_t width = WIDTH ? WIDTH : call.key_width, value_width = WIDTH ? WIDTH : call.value_width;
    const int64_t groups = call.heads / call.key_heads, block_size = call.block_size;
    int64_t longest = 0;
    for (int64_t row = 0; row < call.rows; row++) longest = std::max<int64_t>(longest, context_lens[row]);
    const int64_t most_heads = std::max<int64_t>(1, call.rows * call.key_heads / (TASKS * omp_get_max_threads()));
    const int64_t parts = (call.key_heads + most_heads - 1) / most_heads, each = (call.key_heads + parts - 1) / parts;

#pragma omp parallel
    {
        std::vector<float> scratch(each * groups * (longest + width + value_width + 1));
        float *scores = scratch.data(), *queries = scores + each * groups * longest,
              *sums = queries + each * groups * width, *most = sums + each * groups * value_width;

#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < call.rows * parts; task++) {
            const int64_t row = task / parts, first_head = task % parts * each;
            const int64_t key_heads = std::min(each, call.key_heads - first_head);
            const int64_t length = context_lens[row], last = length - 1;
            const int64_t first = call.window ? std::max<int64_t>(0, length - call.window) : 0;
            const int32_t *blocks = block_tables + row * call.table;
            // Calls what(line, begin, end) for each block: tokens begin..end of the row start at the line of that
            // number in the caches, for the first head of this task; each further head is block_size lines on.
            const auto each_block = [&](const auto &what) {
                for (int64_t begin = first; begin < length;) {
                    const int64_t block = begin / block_size, end = std::min((block + 1) * block_size, length);
                    what((blocks[block] * call.key_heads + first_head) * block_size + begin % block_size, begin, end);
                    begin = end;
                }
            };

            const int64_t newest =
                (blocks[last / block_size] * call.key_heads + first_head) * block_size + last % block_size;
            for (int64_t shared = 0; shared < key_heads; shared++) {
                const int64_t line = newest + shared * block_size;
                std::memcpy(key_cache + line * width,
                            key + row * call.key_row + (first_head + shared) * call.key_head, width * sizeof(T));
                std::memcpy(value_cache + line * value_width,
                            value + row * call.value_row + (first_head + shared) * call.value_head,
                            value_width * sizeof(T));
            }
            for (int64_t i = 0; i < key_heads * groups; i++) {
                const int64_t head = first_head * groups + i;
                const T *q = query + row * call.query_row + head * call.query_head;
                for (int64_t d = 0; d < width; d++) queries[i * width + d] = float(q[d]) * call.scale;
                most[i] = sinks ? sinks[head] : -INFINITY;
            }

            each_block([&](int64_t line, int64_t begin, int64_t end) {
                for (int64_t i = 0; i < key_heads * groups; i++) {
                    const int64_t at = line + i / groups * block_size;
                    most[i] = score_tokens(queries + i * width, key_cache + at * width, value_cache + at * value_width,
                                           end - begin, width, value_width, call.softcap, most[i],
                                           scores + i * longest + begin - first);
                }
            });
            for (int64_t i = 0; i < key_heads * groups; i++) {
                float *own = scores + i * longest, highest = most[i];
                float total = sinks ? exponential(sinks[first_head * groups + i] - highest) : 0;
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < length - first; j++) {
                    own[j] = exponential(own[j] - highest);
                    total += own[j];
                }
                most[i] = total;
            }
            std::fill(sums, sums + key_heads * groups * value_width, 0.0f);
            each_block([&](int64_t line, int64_t begin, int64_t end) {
                for (int64_t i = 0; i < key_heads * groups; i++) {
                    const int64_t at = line + i / groups * block_size;
                    add_values<T, WIDTH>(scores + i * longest + begin - first, value_cache + at * value_width,
                                         end - begin, value_width, sums + i * value_width);
                }
            });
            T *o = out + (row * call.heads + first_head * groups) * value_width;
            for (int64_t i = 0; i < key_heads * groups; i++)
                for (int64_t d = 0; d < value_width; d++)
                    store(o[i * value_width + d], sums[i * value_width + d] / most[i]);
        }
    }
}

template <typename T, typename... Rest>
void paged_attention(const PagedAttention &call, Rest... rest) {
    const int64_t width = call.key_width == call.value_width ? call.key_width : 0;
    const auto known = width == 64 ? attend<T, 64> : width == 128 ? attend<T, 128> : attend<T, 0>;
    known(call, rest...);
}
