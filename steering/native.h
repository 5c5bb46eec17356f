// What the kernels for CPUs have in common.
#pragma once

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
