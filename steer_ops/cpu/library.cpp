// The ops for CPUs, registered with PyTorch; their schemas are in ops.py. This file checks tensors and hands their memory
// to the kernels, which know nothing of PyTorch. It uses PyTorch's stable ABI alone, as of version 2.11.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "paged_attention.h"

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

void paged_attention_decode(const Tensor &query, const Tensor &key, const Tensor &value, Tensor key_cache,
                            Tensor value_cache, const Tensor &block_tables, const Tensor &context_lens, Tensor out,
                            double scale, std::optional<int64_t> window, std::optional<double> softcap,
                            std::optional<Tensor> sinks) {
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
    const Tensor q = with_dense_rows(query), k = with_dense_rows(key), v = with_dense_rows(value);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steer_ops, CPU, library) {
    library.impl("paged_attention_decode", TORCH_BOX(&paged_attention_decode));
}
