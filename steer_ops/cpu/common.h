// Types and functions that the kernels for CPUs share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat16 {
    uint16_t bits;

    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

inline void store(float &to, float value) { to = value; }

inline void store(bfloat16 &to, float value) {  // rounds to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    to.bits = value != value ? 0x7fc0 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

template <typename T>
inline float rounded(float value) {
    T stored;
    store(stored, value);
    return float(stored);
}

// exp(x) of float32, to 1e-7 of its value (the polynomial of Cephes' expf); a loop of it becomes vector instructions.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t power = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}
