// Products of some rows with a panel of a packed weight, in registers.
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
// The four codes of a vector's element are those of the inputs 0, 2, 1, 3. For many rows the codes of a panel are first
// expanded to what the products need, once for all tiles; the sums stay the same, bit by bit.

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

// ---- dense weights

struct Dense32 {
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

// ---- blocks

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
    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format& f,
                         Sums<ROWS, PANELS>& sums) {
        Dense32::multiply<ROWS, PANELS>(rows, index, {panels.expanded, 0, nullptr}, inputs, f, sums);
    }
};

template <int BITS>
struct Blocks {  // rows in float32: products with the numbers of the weight itself
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

// Adds what a group contributes: its sum of products with whole numbers, times the scale, and the offset times the
// sum of the row's numbers.
template <int ROWS, int PANELS>
inline void add_group(const Rows& rows, const int* index, const char* behind, const Format& f, int64_t g, int p,
                      const Vector (&products)[ROWS][2], Sums<ROWS, PANELS>& sums) {
    for (int half = 0; half < 2; half++) {
        const Vector scale = scale_at(behind, f, half);
        for (int r = 0; r < ROWS; r++) {
            const Vector scaled = rows.scales ? scale * rows.scales[index[r] * rows.groups + g] : scale;
            sums[r][p][half] = fma(products[r][half], scaled, sums[r][p][half]);
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
    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format& f,
                         Sums<ROWS, PANELS>& sums) {
        const uint32_t* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const uint32_t*)((const uint16_t*)rows.numbers + index[r] * rows.line);
        for (int64_t g = 0; g < inputs / f.group; g++) {
            Vector products[ROWS][2] = {};
            for (int64_t k = g * f.group / 2; k < (g + 1) * f.group / 2; k++) {
                const char* from = panels.expanded + k * PANEL * 4;
                const Bits first = load<Bits>(from), second = load<Bits>(from + sizeof(Bits));
                for (int r = 0; r < ROWS; r++) {
                    products[r][0] = dot(products[r][0], x[r][k], first);
                    products[r][1] = dot(products[r][1], x[r][k], second);
                }
            }
            add_group<ROWS, PANELS>(rows, index, panels.first + g * group_bytes(f) + group_codes(f), f, g, 0, products,
                                    sums);
        }
    }
};

template <int BITS>
struct BlocksDot {  // rows in pairs of bfloat16, in which all codes are exact
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
                Vector products[ROWS][2] = {};
                for (int64_t four = 0; four < f.group / 4; four++) {
                    fetch(from + four * PANEL * BITS / 2, PANEL * BITS / 2);
                    for (int half = 0; half < 2; half++) {
                        const Bits codes = codes_at<BITS>(from, four, half);
                        for (int second = 0; second < 2; second++) {
                            const Bits weights = decode.pair(codes, second, half);
                            const int64_t k = (g * f.group + 4 * four) / 2 + second;
                            for (int r = 0; r < ROWS; r++) products[r][half] = dot(products[r][half], x[r][k], weights);
                        }
                    }
                }
                add_group<ROWS, PANELS>(rows, index, from + group_codes(f), f, g, p, products, sums);
            }
    }
};
#endif

template <int BITS>
struct BlocksInt8 {  // rows in int8, sums in whole numbers
    static constexpr bool expands = false;

    template <int ROWS, int PANELS>
    static void multiply(const Rows& rows, const int* index, const Panels& panels, int64_t inputs, const Format& f,
                         Sums<ROWS, PANELS>& sums) {
        const uint32_t* x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = (const uint32_t*)((const int8_t*)rows.numbers + index[r] * rows.line);
        for (int64_t g = 0; g < inputs / f.group; g++)
            for (int p = 0; p < PANELS; p++) {
                const char* from = panels.at(p) + g * group_bytes(f);
                Ints wholes[ROWS][2];
                for (int r = 0; r < ROWS; r++)
                    wholes[r][0] = wholes[r][1] = Ints{} - int32_t(f.zero) * rows.wholes[index[r] * rows.groups + g];
                products<ROWS>(x, from, g * f.group / 4, f.group / 4, wholes);
                Vector numbers[ROWS][2];
                for (int r = 0; r < ROWS; r++)
                    for (int half = 0; half < 2; half++)
                        numbers[r][half] = __builtin_convertvector(wholes[r][half], Vector);
                add_group<ROWS, PANELS>(rows, index, from + group_codes(f), f, g, p, numbers, sums);
            }
    }

    template <int ROWS>
    static void products(const uint32_t* const* x, const char* from, int64_t k, int64_t fours, Ints (&wholes)[ROWS][2]) {
#ifdef __AVX512VNNI__
        for (int64_t four = 0; four < fours; four++) {
            fetch(from + four * PANEL * BITS / 2, PANEL * BITS / 2);
            for (int half = 0; half < 2; half++) {
                Bits codes = codes_at<BITS>(from, four, half);
                if constexpr (BITS == 4) codes = codes >> (4 * half) & 0x0f0f0f0fu;
                for (int r = 0; r < ROWS; r++)
                    wholes[r][half] = (Ints)_mm512_dpbusd_epi32(
                        (Whole)wholes[r][half], (Whole)codes, _mm512_set1_epi32(int32_t(x[r][k + four])));
            }
        }
#else
        constexpr int64_t MANY = 8;  // products of 4 bits that 16 bits hold
        for (int64_t start = 0; start < fours; start += MANY)
            for (int half = 0; half < 2; half++)
                for (int nibble = 0; nibble < BITS / 4; nibble++) {
                    Whole shorts[ROWS] = {};
                    for (int64_t four = start; four < start + MANY && four < fours; four++) {
                        if (half + nibble == 0) fetch(from + four * PANEL * BITS / 2, PANEL * BITS / 2);
                        const int shift = BITS == 4 ? 4 * half : 4 * nibble;
                        const Bits codes = codes_at<BITS>(from, four, half) >> shift & 0x0f0f0f0fu;
                        for (int r = 0; r < ROWS; r++)
                            shorts[r] = add_shorts(shorts[r], pairs(codes, Bits{} + x[r][k + four]));
                    }
                    for (int r = 0; r < ROWS; r++) wholes[r][half] += widened(shorts[r]) << (4 * nibble);
                }
#endif
    }
};

}  // namespace
