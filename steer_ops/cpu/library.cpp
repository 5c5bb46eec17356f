// The ops for CPUs, registered with PyTorch; their schemas are in ops.py. This file checks tensors and hands their memory
// to the kernels, which know nothing of PyTorch. It uses PyTorch's stable ABI alone, as of version 2.11.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "gate_mul.h"
#include "paged_attention.h"
#include "rms_norm.h"
#include "rotary.h"
#include "steer.h"
#if defined(__AVX2__) || defined(__AVX512F__)
#define HAS_TILED_LINEAR
#include "tiled_linear.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T *data(const Tensor &tensor) {
    return static_cast<T *>(tensor.data_ptr());
}

Tensor with_dense_rows(const Tensor &tensor) {
    return tensor.stride(-1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

bool has_shape(const Tensor &tensor, std::initializer_list<int64_t> shape) {
    const auto sizes = tensor.sizes();
    return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

bool is(const Tensor &tensor, ScalarType type) { return tensor.scalar_type() == type && tensor.is_contiguous(); }

// Calls what(T()) with the type of a tensor's numbers.
template <typename What>
void with_type(const char *op, ScalarType type, const What &what) {
    if (type == ScalarType::Float)
        what(float());
    else if (type == ScalarType::BFloat16)
        what(bfloat16());
    else
        STD_TORCH_CHECK(false, op, ": only float32 and bfloat16 can be computed");
}

std::tuple<Tensor, Tensor> rotary_of_tokens(const Tensor &query, const Tensor &key, const Tensor &cos,
                                            const Tensor &sin) {
    STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && cos.dim() == 2,
                    "rotary: query and key are [N, heads, width], cos and sin [N, turned]");
    const int64_t tokens = query.size(0), width = query.size(2), turned = cos.size(1);
    const ScalarType type = query.scalar_type();
    STD_TORCH_CHECK(key.size(0) == tokens && key.size(2) == width && has_shape(cos, {tokens, turned}) &&
                        has_shape(sin, {tokens, turned}) && turned % 2 == 0 && turned <= width &&
                        key.scalar_type() == type && is(cos, type) && is(sin, type),
                    "rotary: shapes and dtypes fit each other, and what is turned is even and no wider than a head");
    const Tensor q = with_dense_rows(query), k = with_dense_rows(key);
    Tensor queries = torch::stable::new_empty(q, q.sizes()), keys = torch::stable::new_empty(k, k.sizes());
    const Heads heads[2] = {{q.size(1), q.stride(1), q.stride(0)}, {k.size(1), k.stride(1), k.stride(0)}};
    with_type("rotary", type, [&](auto number) {
        using T = decltype(number);
        rotary<T>(tokens, width, turned, heads, data<const T>(q), data<const T>(k), data<const T>(cos),
                  data<const T>(sin), data<T>(queries), data<T>(keys));
    });
    return {queries, keys};
}

void paged_attention_decode(const Tensor &query, const Tensor &key, const Tensor &value, Tensor key_cache,
                            Tensor value_cache, const Tensor &block_tables, const Tensor &context_lens, Tensor out,
                            double scale, std::optional<int64_t> window, std::optional<double> softcap,
                            std::optional<Tensor> sinks, std::optional<Tensor> cos, std::optional<Tensor> sin) {
    const char *op = "paged_attention_decode";
    STD_TORCH_CHECK(query.dim() == 3 && key_cache.dim() == 4 && value_cache.dim() == 4 && block_tables.dim() == 2, op,
                    ": query has 3 dimensions, the caches 4, block_tables 2");
    const int64_t rows = query.size(0), heads = query.size(1), width = query.size(2);
    const int64_t blocks = key_cache.size(0), key_heads = key_cache.size(1), block_size = key_cache.size(2);
    const int64_t value_width = value_cache.size(3), most_blocks = block_tables.size(1);
    STD_TORCH_CHECK(has_shape(key_cache, {blocks, key_heads, block_size, width}) &&
                        has_shape(value_cache, {blocks, key_heads, block_size, value_width}) &&
                        has_shape(key, {rows, key_heads, width}) && has_shape(value, {rows, key_heads, value_width}) &&
                        has_shape(out, {rows, heads, value_width}) && has_shape(context_lens, {rows}) &&
                        block_tables.size(0) == rows && key_heads > 0 && heads % key_heads == 0,
                    op, ": shapes do not fit each other");
    const ScalarType type = query.scalar_type();
    STD_TORCH_CHECK(key.scalar_type() == type && value.scalar_type() == type && key_cache.scalar_type() == type &&
                        value_cache.scalar_type() == type && out.scalar_type() == type,
                    op, ": queries, keys, values and out have one dtype");
    STD_TORCH_CHECK(block_tables.scalar_type() == ScalarType::Int && context_lens.scalar_type() == ScalarType::Int, op,
                    ": block_tables and context_lens are int32");
    STD_TORCH_CHECK(key_cache.is_contiguous() && value_cache.is_contiguous() && out.is_contiguous() &&
                        context_lens.is_contiguous() && block_tables.stride(1) == 1,
                    op, ": the caches, out, block_tables and context_lens are contiguous");
    STD_TORCH_CHECK(!window || *window > 0, op, ": window is at least 1");
    STD_TORCH_CHECK(!sinks || has_shape(*sinks, {heads}), op, ": sinks are one number for each head");
    STD_TORCH_CHECK(bool(cos) == bool(sin), op, ": cos and sin come together");
    if (sinks) sinks = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
    const int32_t *table = data<int32_t>(block_tables), *lengths = data<int32_t>(context_lens);
    for (int64_t row = 0; row < rows; row++) {
        STD_TORCH_CHECK(lengths[row] > 0 && lengths[row] <= most_blocks * block_size, op, ": row ", row, " has ",
                        lengths[row], " tokens, its blocks hold 1 to ", most_blocks * block_size);
        for (int64_t i = 0; i * block_size < lengths[row]; i++) {
            const int32_t block = table[row * block_tables.stride(0) + i];
            STD_TORCH_CHECK(block >= 0 && block < blocks, op, ": row ", row, " names block ", block, " of ", blocks);
        }
    }
    const auto [turned_query, turned_key] =
        cos ? rotary_of_tokens(query, key, *cos, *sin) : std::tuple<Tensor, Tensor>{query, key};
    const Tensor q = with_dense_rows(turned_query), k = with_dense_rows(turned_key), v = with_dense_rows(value);
    const PagedAttention call{
        rows,        heads,           key_heads,     width,         value_width,   block_size,
        block_tables.stride(0),       window.value_or(0),           q.stride(0),   q.stride(1),
        k.stride(0), k.stride(1),     v.stride(0),   v.stride(1),   float(scale),  float(softcap.value_or(0))};
    with_type(op, type, [&](auto number) {
        using T = decltype(number);
        paged_attention<T>(call, data<const T>(q), data<const T>(k), data<const T>(v), data<T>(key_cache),
                           data<T>(value_cache), table, lengths, data<T>(out),
                           sinks ? data<const float>(*sinks) : nullptr);
    });
}

Tensor steer_and_count(const Tensor &activations, const Tensor &vectors, const Tensor &weights, const Tensor &biases,
                       const Tensor &kinds, const Tensor &keep_norm, const Tensor &clamps, const Tensor &multipliers,
                       const Tensor &opened, const Tensor &owners, Tensor counts, int64_t owner) {
    const char *op = "steer_and_count";
    STD_TORCH_CHECK(activations.dim() == 2 && vectors.dim() == 2 && multipliers.dim() == 2 && opened.dim() == 2,
                    op, ": activations, vectors, multipliers and gates have 2 dimensions");
    const int64_t tokens = activations.size(0), width = activations.size(1), columns = vectors.size(0);
    STD_TORCH_CHECK(has_shape(vectors, {columns, width}) && has_shape(weights, {columns, width}) &&
                        has_shape(biases, {columns}) && has_shape(kinds, {columns}) &&
                        has_shape(keep_norm, {columns}) && has_shape(clamps, {columns, 2}) && multipliers.size(0) >= tokens &&
                        multipliers.size(1) == columns && opened.size(0) >= tokens && opened.size(1) == columns && owners.numel() >= tokens && counts.numel() >= tokens,
                    op, ": shapes do not fit each other");
    STD_TORCH_CHECK(is(vectors, ScalarType::Float) && is(weights, ScalarType::Float) && is(biases, ScalarType::Float) &&
                        is(kinds, ScalarType::Char) && is(keep_norm, ScalarType::Bool) &&
                        is(clamps, ScalarType::Float) && is(owners, ScalarType::Int) &&
                        is(counts, ScalarType::Long) && multipliers.scalar_type() == ScalarType::Float && opened.scalar_type() == ScalarType::Float &&
                        (columns == 0 || (multipliers.stride(1) == 1 && opened.stride(1) == 1)),
                    op, ": columns and multipliers are float32 (kinds int8, keep_norm bool), owners int32, counts int64, "
                        "and all are contiguous");
    const Tensor a = with_dense_rows(activations);
    Tensor out = torch::stable::new_empty(a, a.sizes());
    const Steer call{tokens, columns, width, a.stride(0), multipliers.stride(0), opened.stride(0), owner};
    with_type(op, a.scalar_type(), [&](auto number) {
        using T = decltype(number);
        steer<T>(call, data<const T>(a), data<T>(out), data<float>(vectors), data<float>(weights), data<float>(biases),
                 data<int8_t>(kinds), data<bool>(keep_norm), data<float>(clamps), data<float>(multipliers),
                 data<float>(opened), data<int32_t>(owners), data<int64_t>(counts));
    });
    return out;
}

// How the rows of a tensor lie, the last dimension dense; none where they have more than two strides.
std::optional<Rows> rows_of(const Tensor &x) {
    Rows rows;
    int64_t outer = 1;
    for (int64_t i = x.dim() - 2; i >= 0; i--) {
        const int64_t size = x.size(i), stride = x.stride(i);
        if (size == 1) continue;
        if (outer == 1 && (rows.heads == 1 || stride == rows.heads * rows.head_stride)) {
            if (rows.heads == 1) rows.head_stride = stride;
            rows.heads *= size;
        } else if (outer == 1 || stride == outer * rows.row_stride) {
            if (outer == 1) rows.row_stride = stride;
            outer *= size;
        } else {
            return std::nullopt;
        }
    }
    rows.count = outer * rows.heads;
    return rows;
}

Tensor rms_norm_of_rows(const Tensor &x, const Tensor &weight, double epsilon) {
    const int64_t width = weight.numel();
    const bool is_wide = is(weight, ScalarType::Float);
    STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) == width && (is_wide || is(weight, x.scalar_type())),
                    "rms_norm: x [..., D] and weight [D] have one dtype, or the weight is float32");
    Tensor in = with_dense_rows(x);
    auto rows = rows_of(in);
    if (!rows) rows = rows_of(in = torch::stable::contiguous(in));
    Tensor out = torch::stable::new_empty(in, in.sizes());
    with_type("rms_norm", in.scalar_type(), [&](auto number) {
        using T = decltype(number);
        if (is_wide)
            rms_norm(*rows, width, data<const T>(in), data<const float>(weight), float(epsilon), data<T>(out));
        else
            rms_norm(*rows, width, data<const T>(in), data<const T>(weight), float(epsilon), data<T>(out));
    });
    return out;
}

template <float (*GATE)(float)>
Tensor gate_mul_of_rows(const Tensor &gate_up) {
    STD_TORCH_CHECK(gate_up.dim() > 0 && gate_up.size(-1) % 2 == 0, "gates and ups are side by side");
    const Tensor in = torch::stable::contiguous(gate_up);
    std::vector<int64_t> sizes(in.sizes().begin(), in.sizes().end());
    const int64_t width = sizes.back() /= 2;
    Tensor out = torch::stable::new_empty(in, sizes);
    with_type("gates", in.scalar_type(), [&](auto number) {
        using T = decltype(number);
        gate_mul<T, GATE>(out.numel() / std::max<int64_t>(1, width), width, data<const T>(in), data<T>(out));
    });
    return out;
}

#ifdef HAS_TILED_LINEAR
Tensor tiled_linear_of_rows(const Tensor &x, const Tensor &tiles, std::optional<Tensor> bias, int64_t out_features) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(x.dim() > 0 && tiles.dim() == 4 && is(tiles, type) && tiles.size(2) == OUTPUTS &&
                        x.size(-1) == tiles.size(1) * tiles.size(3) && out_features <= tiles.size(0) * OUTPUTS &&
                        out_features > (tiles.size(0) - 1) * OUTPUTS,
                    "tiled_linear: x and tiles do not fit each other");
    STD_TORCH_CHECK(!bias || (has_shape(*bias, {out_features}) && is(*bias, type)), "tiled_linear: bias is [outputs]");
    const Tensor in = torch::stable::contiguous(x);
    std::vector<int64_t> sizes(in.sizes().begin(), in.sizes().end());
    const int64_t inputs = sizes.back(), tokens = in.numel() / std::max<int64_t>(1, inputs), units = tiles.size(1);
    sizes.back() = out_features;
    Tensor out = torch::stable::new_empty(in, sizes);
    if (type == ScalarType::Float) {
        tiled_linear<Floats>(data<float>(tiles), bias ? data<float>(*bias) : nullptr, data<float>(in), data<float>(out),
                             tokens, units, out_features);
    } else {
        STD_TORCH_CHECK(type == ScalarType::BFloat16 && tiles.size(3) == 2,
                        "tiled_linear: only float32 and bfloat16 can be computed");
        tiled_linear<Pairs>(data<int32_t>(tiles), bias ? data<bfloat16>(*bias) : nullptr, data<int32_t>(in),
                            data<bfloat16>(out), tokens, units, out_features);
    }
    return out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steer_ops, CPU, library) {
    library.impl("steer_and_count", TORCH_BOX(&steer_and_count));
    library.impl("rms_norm", TORCH_BOX(&rms_norm_of_rows));
    library.impl("rotary", TORCH_BOX(&rotary_of_tokens));
    library.impl("silu_mul", TORCH_BOX(&gate_mul_of_rows<silu>));
    library.impl("gelu_tanh_mul", TORCH_BOX(&gate_mul_of_rows<gelu_tanh>));
#ifdef HAS_TILED_LINEAR
    library.impl("tiled_linear", TORCH_BOX(&tiled_linear_of_rows));
#endif
    library.impl("paged_attention_decode", TORCH_BOX(&paged_attention_decode));
}
