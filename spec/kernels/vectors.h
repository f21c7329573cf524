// Vectors of AVX2 or AVX-512, and the few operations on them that the compiler does not choose by itself.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;  // numbers of a vector
using Whole = __m512i;
#else
constexpr int LANES = 8;
using Whole = __m256i;
#endif
constexpr int PANEL = 2 * LANES;  // outputs that lie together in a packed weight

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

template <typename To>
inline To load(const void* from) {
    To out;
    std::memcpy(&out, from, sizeof(out));
    return out;
}

inline Vector all(float number) { return Vector{} + number; }

inline Vector fma(Vector a, Vector b, Vector c) {  // a b + c, rounded once
#ifdef __AVX512F__
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

inline Vector widened(const uint16_t* from) {  // LANES numbers in bfloat16
#ifdef __AVX512F__
    return (Vector)((Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)) << 16);
#else
    return (Vector)((Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)) << 16);
#endif
}

inline Vector from_halves(const void* from) {  // LANES numbers in float16
#ifdef __AVX512F__
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#endif
}

inline Ints nearest(Vector numbers) {  // whole numbers, ties to even
#ifdef __AVX512F__
    return (Ints)_mm512_cvtps_epi32((__m512)numbers);
#else
    return (Ints)_mm256_cvtps_epi32((__m256)numbers);
#endif
}

inline Bytes narrowed(Ints numbers) {  // of 8 bits
#ifdef __AVX512F__
    return (Bytes)_mm512_cvtepi32_epi8((Whole)numbers);
#else
    const __m128i low = _mm256_castsi256_si128((Whole)numbers), high = _mm256_extracti128_si256((Whole)numbers, 1);
    const __m128i shorts = _mm_packs_epi32(low, high);
    const __m128i bytes = _mm_packs_epi16(shorts, shorts);
    return load<Bytes>(&bytes);
#endif
}

inline Ints widened(Bytes bytes) {
#ifdef __AVX512F__
    return (Ints)_mm512_cvtepi8_epi32((__m128i)bytes);
#else
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)&bytes));
#endif
}

// Products of unsigned codes of at most 4 bits with signed bytes, added in pairs to numbers of 16 bits.
inline Whole pairs(Bits codes, Bits bytes) {
#ifdef __AVX512F__
    return _mm512_maddubs_epi16((Whole)codes, (Whole)bytes);
#else
    return _mm256_maddubs_epi16((Whole)codes, (Whole)bytes);
#endif
}

inline Whole add_shorts(Whole a, Whole b) {
#ifdef __AVX512F__
    return _mm512_add_epi16(a, b);
#else
    return _mm256_add_epi16(a, b);
#endif
}

inline Ints widened(Whole shorts) {  // neighbours of 16 bits, added in 32
#ifdef __AVX512F__
    return (Ints)_mm512_madd_epi16(shorts, _mm512_set1_epi16(1));
#else
    return (Ints)_mm256_madd_epi16(shorts, _mm256_set1_epi16(1));
#endif
}

inline uint16_t to_bfloat16(float number) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    if (number != number) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof(number));
    return number;
}

}  // namespace
