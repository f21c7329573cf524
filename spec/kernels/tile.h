// Sums of products in registers: a tile of rows by panels of columns, on vectors of AVX2 or AVX-512.
//
// Every number is added up in the order of the terms, by itself: what a row gets is, bit by bit, the same whatever the
// other rows of its tile and their number.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "vectors.h"

namespace {

constexpr int REGISTERS = LANES == 16 ? 24 : 12;  // vectors of sums
constexpr int MOST = REGISTERS / 2;               // rows of a tile

using Short = uint16_t;  // a bfloat16

inline Vector vector(const float* from) { return load<Vector>(from); }
inline Vector vector(const Short* from) { return widened(from); }

// The two vectors of one term's panel.
template <typename Number>
inline void read(const Number* from, Vector& first, Vector& second) {
    first = vector(from), second = vector(from + LANES);
}

// sums[r][p] = the sum over k < count of x[r * line + k] * (panel p of term k), which stands at
// from + k * step + p * apart; memory is fetched `ahead` bytes before its use.
template <int ROWS, int PANELS, typename Number>
inline void multiply(const float* x, int64_t line, const Number* from, int64_t step, int64_t apart, int64_t count,
                     int64_t ahead, Vector (&sums)[ROWS][PANELS][2]) {
    constexpr int64_t bytes = sizeof(Number) * PANEL;
    std::memset(&sums, 0, sizeof(sums));
    for (int64_t k = 0; k < count; k++)
        for (int p = 0; p < PANELS; p++) {
            const Number* panel = from + k * step + p * apart;
            for (int64_t at = 0; at < bytes; at += 64)
                if (ahead) __builtin_prefetch((const char*)panel + ahead + at);
            Vector first, second;
            read(panel, first, second);
            for (int r = 0; r < ROWS; r++) {
                const float number = x[r * line + k];
                sums[r][p][0] += number * first;
                sums[r][p][1] += number * second;
            }
        }
}

// Calls work(std::integral_constant<int, rows>()) for 1 to MOST rows.
template <int ROWS = MOST, typename Work>
void with_rows(int64_t rows, Work work) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return with_rows<ROWS - 1>(rows, work);
    work(std::integral_constant<int, ROWS>());
}

// Calls work(rows, from) for tiles of as equal a size as can be that together are `rows`.
template <typename Work>
void in_tiles(int64_t rows, Work work) {
    const int64_t cuts = (rows + MOST - 1) / MOST;
    for (int64_t cut = 0; cut < cuts; cut++) {
        const int64_t from = rows * cut / cuts, to = rows * (cut + 1) / cuts;
        with_rows(to - from, [&](auto count) { work(count, from); });
    }
}

}  // namespace
