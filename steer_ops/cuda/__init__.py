"""The kernels for CUDA: in Triton, and FlashAttention 2 as PyTorch has it. See `library`."""
