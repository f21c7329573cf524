// Products of some rows with a panel (products.h) of weights in blocks of 8 or 4 bits.
//
// For many rows the codes of a panel are first expanded to what the products need, once for all tiles; the sums stay the
// same, bit by bit.

#pragma once

#include <utility>

#include "dense.h"

namespace {

// The vector of codes with the first or second outputs of four inputs; of 4 bits both are in the same bytes.
template <int BITS>
inline Bits codes_at(const char* from, int64_t four, int half) {
    if constexpr (BITS == 4) return load<Bits>(from + four * sizeof(Bits));
    return load<Bits>(from + (2 * four + half) * sizeof(Bits));
}

// Codes to the numbers that they mean.
template <int BITS>
struct Decoder {
    explicit Decoder(int64_t zero) : zero(int32_t(zero)) {
#ifdef __AVX512F__
        for (int code = 0; code < 16; code++) {
            table[code] = float(code - zero);
            short_table[code] = short_table[code + 16] = to_bfloat16(float(code - zero));
        }
#endif
    }

    // The numbers in float32 of one of the four inputs.
    Vector number(Bits codes, int input, int half) const {
        constexpr int at[4] = {0, 16, 8, 24};
        const int shift = at[input] + (BITS == 4 ? 4 * half : 0);
#ifdef __AVX512F__
        if constexpr (BITS == 4)  // the upper bits of an index are not looked at
            return (Vector)_mm512_permutexvar_ps((Whole)(codes >> shift), (__m512)load<Vector>(table));
#endif
        const Ints code = (Ints)(codes >> shift & ((1u << BITS) - 1));
        return __builtin_convertvector(code - zero, Vector);
    }

#ifdef __AVX512BF16__
    // The numbers in bfloat16 of the first two of the four inputs, or of the second two.
    Bits pair(Bits codes, int second, int half) const {
        if constexpr (BITS == 4) {
            const int shift = 8 * second + 4 * half;
            return (Bits)_mm512_permutexvar_epi16((Whole)(codes >> shift), (Whole)load<Bits>(short_table));
        }
        const Bits even = (Bits)number(codes, 2 * second, half), odd = (Bits)number(codes, 2 * second + 1, half);
        return (even >> 16) | (odd & 0xffff0000u);  // whole numbers up to 255 have no other bits
    }
#endif

    int32_t zero;
#ifdef __AVX512F__
    alignas(64) float table[16];
    alignas(64) uint16_t short_table[32];
#endif
};

struct ExpandedBlocks {  // rows in float32: a panel of float32
    static constexpr bool sums_groups = false;
    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format& f,
                         Sums<ROWS, PANELS>& sums) {
        Dense32::multiply<ROWS, PANELS>(rows, index, {panels.expanded, 0, nullptr}, inputs, f, sums);
    }
};

template <int BITS>
struct Blocks {  // rows in float32: products with the numbers of the weight itself
    static constexpr bool sums_groups = false;
    static constexpr bool expands = true;
    using Expanded = ExpandedBlocks;

    static int64_t expanded_bytes(int64_t inputs) { return inputs * PANEL * 4; }

    static void expand(const char* panel, int64_t inputs, const Format& f, char* to) {
        const Decoder<BITS> decode(f.zero);
        for (int64_t start = 0; start < inputs; start += f.group) {
            const char *from = panel + start / f.group * group_bytes(f), *behind = from + group_codes(f);
            for (int half = 0; half < 2; half++) {
                const Vector scale = scale_at(behind, f, half);
                const Vector offset = f.has_offsets ? scale_at(behind + PANEL * f.scale_bytes, f, half) : Vector{};
                for (int64_t four = 0; four < f.group / 4; four++)
                    for (int i = 0; i < 4; i++) {
                        const Vector weight = fma(decode.number(codes_at<BITS>(from, four, half), i, half), scale, offset);
                        std::memcpy(to + ((start + 4 * four + i) * 2 + half) * sizeof(Vector), &weight, sizeof(weight));
                    }
            }
        }
    }

    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format& f,
                         Sums<ROWS, PANELS>& sums) {
        const Decoder<BITS> decode(f.zero);
        const float* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const float*)rows.numbers + index[r] * rows.line;
        for (int64_t start = 0; start < inputs; start += f.group)
            for (int p = 0; p < PANELS; p++) {
                const char *from = panels.at(p) + start / f.group * group_bytes(f), *behind = from + group_codes(f);
                Vector scale[2], offset[2] = {};
                for (int half = 0; half < 2; half++) {
                    scale[half] = scale_at(behind, f, half);
                    if (f.has_offsets) offset[half] = scale_at(behind + PANEL * f.scale_bytes, f, half);
                }
                for (int64_t four = 0; four < f.group / 4; four++) {
                    fetch(from + four * PANEL * BITS / 2, PANEL * BITS / 2);
                    for (int half = 0; half < 2; half++) {
                        const Bits codes = codes_at<BITS>(from, four, half);
                        for (int i = 0; i < 4; i++) {
                            const Vector weight = fma(decode.number(codes, i, half), scale[half], offset[half]);
                            const int64_t k = start + 4 * four + i;
                            for (int r = 0; r < ROWS; r++)
                                sums[r][p][half] = fma(all(x[r][k]), weight, sums[r][p][half]);
                        }
                    }
                }
            }
    }
};

// How many halves of a panel a group is multiplied with at a time: of many rows one, so that all sums are in registers.
template <int ROWS>
constexpr int HALVES = ROWS > 4 ? 1 : 2;

template <int ROWS, typename Work>
inline void in_halves(Work work) {
    work(std::integral_constant<int, 0>());
    if constexpr (HALVES<ROWS> == 1) work(std::integral_constant<int, 1>());
}

// Adds what a group contributes to some halves of a panel: its sums of products with whole numbers, times the scale, and
// the offset times the sum of the row's numbers.
template <int ROWS, int PANELS>
inline void add_group(const Rows& rows, const int* index, const char* behind, const Format& f, int64_t g, int p, int first,
                      const Vector (&products)[ROWS][HALVES<ROWS>], Sums<ROWS, PANELS>& sums) {
    for (int half = first; half < first + HALVES<ROWS>; half++) {
        const Vector scale = scale_at(behind, f, half);
        for (int r = 0; r < ROWS; r++) {
            const Vector scaled = rows.scales ? scale * rows.scales[index[r] * rows.groups + g] : scale;
            sums[r][p][half] = fma(products[r][half - first], scaled, sums[r][p][half]);
        }
        if (f.has_offsets) {
            const Vector offset = scale_at(behind + PANEL * f.scale_bytes, f, half);
            for (int r = 0; r < ROWS; r++)
                sums[r][p][half] = fma(all(rows.sums[index[r] * rows.groups + g]), offset, sums[r][p][half]);
        }
    }
}

#ifdef __AVX512BF16__
struct ExpandedBlocksDot {  // rows in pairs of bfloat16: a panel of pairs of codes
    static constexpr bool sums_groups = true;
    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format& f,
                         Sums<ROWS, PANELS>& sums) {
        const uint32_t* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const uint32_t*)((const uint16_t*)rows.numbers + index[r] * rows.line);
        for (int64_t g = 0; g < inputs / f.group; g++) {
            const char* behind = panels.first + g * group_bytes(f) + group_codes(f);
            in_halves<ROWS>([&](auto first) {
                Vector products[ROWS][HALVES<ROWS>] = {};
                for (int64_t k = g * f.group / 2; k < (g + 1) * f.group / 2; k++)
                    for (int half = 0; half < HALVES<ROWS>; half++) {
                        const Bits weights = load<Bits>(panels.expanded + (2 * k + first + half) * sizeof(Bits));
                        for (int r = 0; r < ROWS; r++) products[r][half] = dot(products[r][half], x[r][k], weights);
                    }
                add_group<ROWS, PANELS>(rows, index, behind, f, g, 0, first, products, sums);
            });
        }
    }
};

template <int BITS>
struct BlocksDot {  // rows in pairs of bfloat16, in which all codes are exact
    static constexpr bool sums_groups = true;
    static constexpr bool expands = true;
    using Expanded = ExpandedBlocksDot;

    static int64_t expanded_bytes(int64_t inputs) { return inputs * PANEL * 2; }

    static void expand(const char* panel, int64_t inputs, const Format& f, char* to) {
        const Decoder<BITS> decode(f.zero);
        for (int64_t k = 0; k < inputs / 2; k++)
            for (int half = 0; half < 2; half++) {
                const char* from = panel + 2 * k / f.group * group_bytes(f);
                const Bits pair = decode.pair(codes_at<BITS>(from, 2 * k % f.group / 4, half), k % 2, half);
                std::memcpy(to + (2 * k + half) * sizeof(Bits), &pair, sizeof(pair));
            }
    }

    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format& f,
                         Sums<ROWS, PANELS>& sums) {
        const Decoder<BITS> decode(f.zero);
        const uint32_t* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const uint32_t*)((const uint16_t*)rows.numbers + index[r] * rows.line);
        for (int64_t g = 0; g < inputs / f.group; g++)
            for (int p = 0; p < PANELS; p++) {
                const char* from = panels.at(p) + g * group_bytes(f);
                in_halves<ROWS>([&](auto first) {
                    Vector products[ROWS][HALVES<ROWS>] = {};
                    for (int64_t four = 0; four < f.group / 4; four++) {
                        if (first == 0) fetch(from + four * PANEL * BITS / 2, PANEL * BITS / 2);
                        for (int half = 0; half < HALVES<ROWS>; half++) {
                            const Bits codes = codes_at<BITS>(from, four, first + half);
                            for (int second = 0; second < 2; second++) {
                                const Bits weights = decode.pair(codes, second, first + half);
                                const int64_t k = (g * f.group + 4 * four) / 2 + second;
                                for (int r = 0; r < ROWS; r++)
                                    products[r][half] = dot(products[r][half], x[r][k], weights);
                            }
                        }
                    }
                    add_group<ROWS, PANELS>(rows, index, from + group_codes(f), f, g, p, first, products, sums);
                });
            }
    }
};
#endif

template <int BITS>
struct BlocksInt8 {  // rows in int8, sums in whole numbers
    static constexpr bool sums_groups = true;
    static constexpr bool expands = false;

    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format& f,
                         Sums<ROWS, PANELS>& sums) {
        const uint32_t* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const uint32_t*)((const int8_t*)rows.numbers + index[r] * rows.line);
        for (int64_t g = 0; g < inputs / f.group; g++)
            for (int p = 0; p < PANELS; p++) {
                const char* from = panels.at(p) + g * group_bytes(f);
                in_halves<ROWS>([&](auto first) {
                    Ints wholes[ROWS][HALVES<ROWS>];
                    for (int r = 0; r < ROWS; r++)
                        for (Ints& whole : wholes[r])
                            whole = Ints{} - int32_t(f.zero) * rows.wholes[index[r] * rows.groups + g];
                    products<ROWS, first>(x, from, g * f.group / 4, f.group / 4, wholes);
                    Vector numbers[ROWS][HALVES<ROWS>];
                    for (int r = 0; r < ROWS; r++)
                        for (int half = 0; half < HALVES<ROWS>; half++)
                            numbers[r][half] = __builtin_convertvector(wholes[r][half], Vector);
                    add_group<ROWS, PANELS>(rows, index, from + group_codes(f), f, g, p, first, numbers, sums);
                });
            }
    }

    template <int ROWS, int first>
    static void products(const uint32_t* const* x, const char* from, int64_t k, int64_t fours,
                         Ints (&wholes)[ROWS][HALVES<ROWS>]) {
#ifdef __AVX512VNNI__
        for (int64_t four = 0; four < fours; four++) {
            if (first == 0) fetch(from + four * PANEL * BITS / 2, PANEL * BITS / 2);
            for (int half = 0; half < HALVES<ROWS>; half++) {
                Bits codes = codes_at<BITS>(from, four, first + half);
                if constexpr (BITS == 4) codes = codes >> (4 * (first + half)) & 0x0f0f0f0fu;
                for (int r = 0; r < ROWS; r++)
                    wholes[r][half] = (Ints)_mm512_dpbusd_epi32(
                        (Whole)wholes[r][half], (Whole)codes, _mm512_set1_epi32(int32_t(x[r][k + four])));
            }
        }
#else
        constexpr int64_t MANY = 8;  // products of 4 bits that 16 bits hold
        for (int64_t start = 0; start < fours; start += MANY)
            for (int half = 0; half < HALVES<ROWS>; half++)
                for (int nibble = 0; nibble < BITS / 4; nibble++) {
                    Whole shorts[ROWS] = {};
                    for (int64_t four = start; four < start + MANY && four < fours; four++) {
                        if (first + half + nibble == 0) fetch(from + four * PANEL * BITS / 2, PANEL * BITS / 2);
                        const int shift = BITS == 4 ? 4 * (first + half) : 4 * nibble;
                        const Bits codes = codes_at<BITS>(from, four, first + half) >> shift & 0x0f0f0f0fu;
                        for (int r = 0; r < ROWS; r++)
                            shorts[r] = add_shorts(shorts[r], pairs(codes, Bits{} + x[r][k + four]));
                    }
                    for (int r = 0; r < ROWS; r++) wholes[r][half] += widened(shorts[r]) << (4 * nibble);
                }
#endif
    }
};

}  // namespace
