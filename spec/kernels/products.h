// What products of some rows with panels of a packed weight are made of; dense.h and blocks.h take them, in registers.
//
// A panel holds the weights of PANEL outputs, of the first LANES and the second, in the order of the inputs; behind them
// stand PANEL biases in float32. Every sum is taken in the order of the inputs, for each row by itself: what a row gets is,
// bit by bit, the same whatever the other rows of its tile and their number.
//
//     weights       a panel holds                                                          rows are
//     float32       for each input two vectors                                             float32
//     bfloat16      for each pair of inputs two vectors of pairs                           float32, or bfloat16 where
//                                                                                          the processor multiplies it
//     8 bits        for each group of inputs: for each four of them two vectors of codes,  as above, or int8 with a
//                   then scales, then offsets                                              scale for each group
//     4 bits        the same with one vector, of which the second LANES outputs have the   as above
//                   upper halves of the bytes
//
// The four codes of a vector's element are those of the inputs 0, 2, 1, 3.

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t AHEAD = 4096;  // bytes that are fetched before they are used

// How the weights of a layer are packed, and what its rows become.
struct Format {
    int64_t bits;        // of a weight: 32, 16, 8, 4
    int64_t group;       // inputs that share a scale (8 and 4 bits)
    int64_t scale_bytes; // 2 or 4
    int64_t has_offsets;
    int64_t zero;        // the code that means 0
    int64_t int8;        // whether rows are rounded to 8 bits
};

inline int64_t group_codes(const Format& f) { return f.group * PANEL * f.bits / 8; }
inline int64_t group_bytes(const Format& f) {
    return group_codes(f) + PANEL * f.scale_bytes * (f.has_offsets ? 2 : 1);
}
inline int64_t panel_bytes(const Format& f, int64_t inputs) {
    if (f.bits == 32) return (inputs + 1) * PANEL * 4;
    if (f.bits == 16) return (inputs + 1) / 2 * PANEL * 4 + PANEL * 4;
    return inputs / f.group * group_bytes(f) + PANEL * 4;
}

// Rows as a kind of product takes them.
struct Rows {
    const void* numbers;   // (rows, line): float32, bfloat16 in pairs, or int8
    int64_t line;          // numbers from row to row
    const float* scales;   // (rows, groups), of int8
    const float* sums;     // (rows, groups), of the numbers of a group
    const int32_t* wholes; // (rows, groups), of the bytes of a group
    int64_t groups;
};

inline void fetch(const char* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + AHEAD + at);
}

inline Vector scale_at(const char* from, const Format& f, int half) {
    return f.scale_bytes == 2 ? from_halves(from + half * LANES * 2) : load<Vector>(from + half * LANES * 4);
}

// Panels that lie one behind the other, and the expanded codes of the first.
struct Panels {
    const char* first;
    int64_t apart;
    const char* expanded;

    const char* at(int p) const { return first + p * apart; }
};

// The sums of a tile: of ROWS rows, PANELS panels and their two halves.
template <int ROWS, int PANELS>
using Sums = Vector[ROWS][PANELS][2];

}  // namespace
