// The rows of a call as the products (products.h) take them: as they are, widened to float32, or rounded to 8 bits, with
// the sums of their groups.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "products.h"

namespace {

// What the rows of a call become, where they are not multiplied as they are.
struct Prepared {
    std::vector<float> numbers, scales, sums;
    std::vector<uint16_t> halves;
    std::vector<int8_t> bytes;
    std::vector<int32_t> wholes;
};

float at(const void* x, bool bfloat16, int64_t index) {
    return bfloat16 ? from_bfloat16(((const uint16_t*)x)[index]) : ((const float*)x)[index];
}

template <int H, typename Lanes, int... I>
Lanes swapped(Lanes lanes, std::integer_sequence<int, I...>) {  // lanes H apart
    return __builtin_shufflevector(lanes, lanes, (I ^ H)...);
}

// All lanes combined, by pairs.
template <int H = LANES / 2, typename Lanes, typename Combine>
auto folded(Lanes lanes, Combine combine) {
    lanes = combine(lanes, swapped<H>(lanes, std::make_integer_sequence<int, LANES>()));
    if constexpr (H > 1)
        return folded<H / 2>(lanes, combine);
    else
        return lanes[0];
}

template <typename Lanes>
auto sum_of(Lanes lanes) {
    return folded(lanes, [](Lanes a, Lanes b) { return a + b; });
}

Vector vector_at(const void* x, bool bfloat16, int64_t index) {
    return bfloat16 ? widened((const uint16_t*)x + index) : load<Vector>((const float*)x + index);
}

// The sums of the groups of a row, each in an order of its own.
void sum_groups(const void* x, bool bfloat16, int64_t row, int64_t inputs, int64_t group, float* sums) {
    for (int64_t g = 0; g < inputs / group; g++) {
        Vector lanes = {};
        for (int64_t k = 0; k < group; k += LANES) lanes += vector_at(x, bfloat16, row * inputs + g * group + k);
        sums[g] = sum_of(lanes);
    }
}

template <int... I>
Bytes in_order(Bytes bytes, std::integer_sequence<int, I...>) {  // of each four those of the inputs 0, 2, 1, 3
    return __builtin_shufflevector(bytes, bytes, (I % 4 == 1 ? I + 1 : I % 4 == 2 ? I - 1 : I)...);
}

// A row in 8 bits. A group with a number that is not finite gets a scale of NaN.
void round_row(const void* x, bool bfloat16, int64_t row, int64_t inputs, int64_t group, int8_t* bytes, float* scales,
               float* sums, int32_t* wholes) {
    for (int64_t g = 0; g < inputs / group; g++, bytes += group) {
        const int64_t start = row * inputs + g * group;
        Vector highest = {}, nothing = {};
        for (int64_t k = 0; k < group; k += LANES) {
            const Vector numbers = vector_at(x, bfloat16, start + k), size = (Vector)((Bits)numbers & 0x7fffffffu);
            highest = size > highest ? size : highest;
            nothing += numbers * 0.0f;
        }
        const float most = folded(highest, [](Vector a, Vector b) { return a > b ? a : b; });
        const float nan = sum_of(nothing);
        const float scale = nan == 0 ? most / 127.0f : 0.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
        Ints whole = {};
        for (int64_t k = 0; k < group; k += LANES) {
            const Ints rounded = nearest(nan == 0 ? vector_at(x, bfloat16, start + k) * inverse : Vector{});
            const Ints byte = rounded < -127 ? Ints{} - 127 : rounded > 127 ? Ints{} + 127 : rounded;
            const Bytes ordered = in_order(narrowed(byte), std::make_integer_sequence<int, LANES>());
            std::memcpy(bytes + k, &ordered, sizeof(ordered));
            whole += byte;
        }
        scales[g] = scale + nan, wholes[g] = sum_of(whole), sums[g] = scales[g] * float(wholes[g]);
    }
}

// Rows as the products take them. `pairs`: in bfloat16.
class Preparation {
public:
    Preparation(const void* x, bool bfloat16, bool pairs, int64_t count, int64_t inputs, const Format& f, Prepared& made)
        : x(x), bfloat16(bfloat16), pairs(pairs), inputs(inputs), f(f), made(made) {
        const bool blocks = f.bits < 16;
        groups = blocks ? inputs / f.group : 0;
        line = f.bits == 16 ? inputs + inputs % 2 : inputs;
        if (f.int8) made.bytes.resize(count * inputs), made.scales.resize(count * groups), made.wholes.resize(count * groups);
        if (f.int8 || (pairs && f.has_offsets)) made.sums.resize(count * groups);
        widened = bfloat16 && !pairs && !f.int8;
        if (widened || (!bfloat16 && line != inputs)) made.numbers.resize(count * line);
        if (pairs && line != inputs) made.halves.resize(count * line);
    }

    // Whether there is anything to do for a row.
    bool needed() const { return !made.bytes.empty() || !made.sums.empty() || !made.numbers.empty() || !made.halves.empty(); }

    void row(int64_t r) {
        if (!made.numbers.empty()) {
            float* to = made.numbers.data() + r * line;
            to[line - 1] = 0;
            for (int64_t k = 0; k < inputs; k++) to[k] = at(x, bfloat16, r * inputs + k);
        }
        if (!made.halves.empty()) {
            uint16_t* to = made.halves.data() + r * line;
            to[line - 1] = 0;
            std::memcpy(to, (const uint16_t*)x + r * inputs, inputs * 2);
        }
        if (f.int8)
            round_row(x, bfloat16, r, inputs, f.group, made.bytes.data() + r * inputs, made.scales.data() + r * groups,
                      made.sums.data() + r * groups, made.wholes.data() + r * groups);
        else if (!made.sums.empty())
            sum_groups(x, bfloat16, r, inputs, f.group, made.sums.data() + r * groups);
    }

    Rows rows() const {
        const void* numbers = x;
        if (!made.numbers.empty()) numbers = made.numbers.data();
        if (!made.halves.empty()) numbers = made.halves.data();
        if (f.int8) numbers = made.bytes.data();
        return {numbers, line, f.int8 ? made.scales.data() : nullptr, made.sums.data(), made.wholes.data(), groups};
    }

private:
    const void* x;
    bool bfloat16, pairs, widened;
    int64_t inputs, line, groups;
    const Format& f;
    Prepared& made;
};

}  // namespace
