// Products of some rows with a panel (products.h) of weights in float32 or bfloat16.

#pragma once

#include "products.h"

namespace {

struct Dense32 {
    static constexpr bool sums_groups = false;
    static constexpr bool expands = false;

    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format&,
                         Sums<ROWS, PANELS>& sums) {
        const float* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const float*)rows.numbers + index[r] * rows.line;
        for (int64_t k = 0; k < inputs; k++)
            for (int p = 0; p < PANELS; p++) {
                const char* from = panels.at(p) + k * PANEL * 4;
                fetch(from, PANEL * 4);
                const Vector first = load<Vector>(from), second = load<Vector>(from + sizeof(Vector));
                for (int r = 0; r < ROWS; r++) {
                    sums[r][p][0] = fma(all(x[r][k]), first, sums[r][p][0]);
                    sums[r][p][1] = fma(all(x[r][k]), second, sums[r][p][1]);
                }
            }
    }
};

struct Dense16 {  // rows in float32
    static constexpr bool sums_groups = false;
    static constexpr bool expands = false;

    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format&,
                         Sums<ROWS, PANELS>& sums) {
        const float* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const float*)rows.numbers + index[r] * rows.line;
        for (int64_t k = 0; k < inputs; k += 2)  // there is a zero behind a row of odd length
            for (int p = 0; p < PANELS; p++) {
                const char* from = panels.at(p) + k * PANEL * 2;
                fetch(from, PANEL * 4);
                for (int half = 0; half < 2; half++) {
                    const Bits both = load<Bits>(from + half * sizeof(Bits));
                    const Vector even = (Vector)(both << 16), odd = (Vector)(both & 0xffff0000u);
                    for (int r = 0; r < ROWS; r++) {
                        sums[r][p][half] = fma(all(x[r][k]), even, sums[r][p][half]);
                        sums[r][p][half] = fma(all(x[r][k + 1]), odd, sums[r][p][half]);
                    }
                }
            }
    }
};

#ifdef __AVX512BF16__
inline Vector dot(Vector sum, uint32_t pair, Bits weights) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int32_t(pair)), (__m512bh)weights);
}

struct Dense16Dot {  // rows in pairs of bfloat16
    static constexpr bool sums_groups = false;
    static constexpr bool expands = false;

    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format&,
                         Sums<ROWS, PANELS>& sums) {
        const uint32_t* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const uint32_t*)((const uint16_t*)rows.numbers + index[r] * rows.line);
        for (int64_t k = 0; k < (inputs + 1) / 2; k++)
            for (int p = 0; p < PANELS; p++) {
                const char* from = panels.at(p) + k * PANEL * 4;
                fetch(from, PANEL * 4);
                const Bits first = load<Bits>(from), second = load<Bits>(from + sizeof(Bits));
                for (int r = 0; r < ROWS; r++) {
                    sums[r][p][0] = dot(sums[r][p][0], x[r][k], first);
                    sums[r][p][1] = dot(sums[r][p][1], x[r][k], second);
                }
            }
    }
};
#endif

}  // namespace
