// Attention of a few query tokens over a long slot cache, on a CPU.
//
// Decoding attends with 1 to some dozens of queries to hundreds of slots, for which general kernels spend more on
// packing and on calls of matrix products than on arithmetic. Here every key is read once, for all queries of its
// group, and a row is read as far as one of its queries sees. Numbers are bfloat16 or float32, sums float32.
//
// What a query gets is, bit by bit, the same whatever the other queries, their number and the masked slots (of finite
// numbers) between those that it sees: so a tree of drafts that is small enough to come here is verified with the very
// numbers of plain decoding. Needs GCC 12 or Clang. Compiled and called by native.py; knows nothing of torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace {

constexpr int64_t CHUNK = 128;  // slots that are read at a time
constexpr int64_t KEY_LANES = 64, VALUE_LANES = 32;  // sums that are held in registers
constexpr int64_t MAX_WIDTH = 512;  // numbers of a head

using Short = uint16_t;  // a bfloat16

inline float number(float x) { return x; }

inline float number(Short x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void put(float* place, float x) { *place = x; }

inline void put(Short* place, float x) {  // rounded to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *place = std::isnan(x) ? 0x7fc0 : Short((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float exponential(float x) {  // of x <= 0, to 2 units in the last place; NaN stays NaN
    x = x < -87.0f ? -87.0f : x;
    float n = std::nearbyint(x * 1.44269504f);
    float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

struct Sizes {  // as attention.py lays them out; strides in numbers
    int64_t batch, heads, groups, nodes, slots, width, value_width;  // groups: heads of keys and values
    int64_t query[3], key[3], value[3], mask[2];  // strides of row, head and token; of row and query
};

typedef float Lanes __attribute__((vector_size(64)));  // 16 numbers

template <int H, int... I>
inline void exchange(Lanes& a, Lanes& b, std::integer_sequence<int, I...>) {
    const Lanes low = __builtin_shufflevector(a, b, (I & H ? 16 + I - H : I)...);
    b = __builtin_shufflevector(a, b, (I & H ? 16 + I : I + H)...);
    a = low;
}

template <int H>
inline void exchange_all(Lanes* rows) {  // one step of Eklundh's transposition
    for (int i = 0; i < 16; i++)
        if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_integer_sequence<int, 16>());
}

// A chunk of keys as float32, by number: block[d][t]. What lies beyond `count` means nothing.
template <typename Number>
void read_keys(const Number* from, int64_t stride, int64_t count, int64_t width, float* block) {
    const int64_t whole = width / 16 * 16;
    for (int64_t t = 0; t < count; t += 16) {
        for (int64_t d = 0; d < whole; d += 16) {
            Lanes rows[16];
            for (int64_t i = 0; i < 16; i++) {
                const Number* line = from + std::min(t + i, count - 1) * stride + d;
                for (int64_t j = 0; j < 16; j++) rows[i][j] = number(line[j]);
            }
            exchange_all<8>(rows), exchange_all<4>(rows), exchange_all<2>(rows), exchange_all<1>(rows);
            for (int64_t i = 0; i < 16; i++) std::memcpy(block + (d + i) * CHUNK + t, &rows[i], sizeof(Lanes));
        }
        for (int64_t d = whole; d < width; d++)
            for (int64_t i = t; i < std::min(t + 16, count); i++) block[d * CHUNK + i] = number(from[i * stride + d]);
    }
}

// VALUE_LANES numbers of a chunk of values as float32, by slot: block[t][d].
template <typename Number>
void read_values(const Number* from, int64_t stride, int64_t count, int64_t width, float* block) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < width; d++) block[t * VALUE_LANES + d] = number(from[t * stride + d]);
}

// sums[r][i] += sum over j of weights[r][j] * block[j][i], in the order of j, for ROWS rows of weights and LANES
// numbers i: these stay in registers.
template <int ROWS, int LANES>
inline void accumulate(const float* const* weights, const float* block, int64_t count, int64_t stride,
                       float* const* sums) {
    float own[ROWS][LANES];
    for (int r = 0; r < ROWS; r++) std::memcpy(own[r], sums[r], sizeof(own[r]));
    for (int64_t j = 0; j < count; j++)
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < LANES; i++) own[r][i] += weights[r][j] * block[j * stride + i];
    for (int r = 0; r < ROWS; r++) std::memcpy(sums[r], own[r], sizeof(own[r]));
}

// The scores of a chunk of `count` slots, for all queries of a group; a query's scores are `line` numbers apart.
template <typename Number>
void score(const Number* query, const Number* key, float scale, const Sizes& s, int64_t count, float* block,
           float* scores, int64_t line) {
    float own[MAX_WIDTH];
    read_keys(key, s.key[2], count, s.width, block);
    for (int64_t j = 0; j < s.heads / s.groups * s.nodes; j++) {
        const Number* from = query + j / s.nodes * s.query[1] + j % s.nodes * s.query[2];
        for (int64_t d = 0; d < s.width; d++) own[d] = number(from[d]) * scale;
        for (int64_t t = 0; t < count; t += KEY_LANES) {
            float *sums = scores + j * line + t, *weights = own;
            std::fill(sums, sums + KEY_LANES, 0.0f);
            accumulate<1, KEY_LANES>(&weights, block + t, s.width, CHUNK, &sums);
        }
    }
}

// Scores to exponentials, 0 where nothing is seen; returns their sum. Maximum and sum (in float64) do not depend on
// where among masked slots the others lie.
float weigh(float* scores, const uint8_t* seen, int64_t count) {
    float highest = -INFINITY;
    double total = 0;
    for (int64_t t = 0; t < count; t++) highest = seen[t] && scores[t] > highest ? scores[t] : highest;
    for (int64_t start = 0; start < count; start += 16) {  // whole vectors, so that every slot is treated alike
        bool here[16];
        for (int64_t i = 0; i < 16; i++) here[i] = start + i < count && seen[start + i];
        for (int64_t i = 0; i < 16; i++) {
            const float e = exponential(scores[start + i] - highest);
            scores[start + i] = here[i] ? e : 0.0f;
        }
        for (int64_t i = 0; i < 16; i++) total += scores[start + i];
    }
    return float(total);
}

// VALUE_LANES numbers of the weighted sums of values, for all queries of a group, slot after slot.
template <typename Number>
void sum_values(const Number* value, const Sizes& s, int64_t first, int64_t reach, const float* weights, int64_t line,
                float* block, float* sums) {
    const int64_t queries = s.heads / s.groups * s.nodes, width = std::min(VALUE_LANES, s.value_width - first);
    std::fill(sums, sums + queries * VALUE_LANES, 0.0f);
    for (int64_t start = 0; start < reach; start += CHUNK) {
        const int64_t count = std::min(CHUNK, reach - start);
        read_values(value + start * s.value[2] + first, s.value[2], count, width, block);
        for (int64_t j = 0; j < queries; j += 2) {
            const int64_t next = std::min(j + 1, queries - 1);  // the last one again, where it is alone
            const float* rows[] = {weights + j * line + start, weights + next * line + start};
            float* two[] = {sums + j * VALUE_LANES, sums + next * VALUE_LANES};
            accumulate<2, VALUE_LANES>(rows, block, count, VALUE_LANES, two);
        }
    }
}

template <typename Number>
void attend(const Number* query, const Number* key, const Number* value, const uint8_t* mask, float scale,
            Number* out, const Sizes& s, int threads) {
    const int64_t share = s.heads / s.groups, queries = share * s.nodes;
    const int64_t chunks = (s.slots + CHUNK - 1) / CHUNK, line = chunks * CHUNK;
    const int64_t blocks = (s.value_width + VALUE_LANES - 1) / VALUE_LANES;
    std::vector<int64_t> reach(s.batch, 0);  // slots that any query of the row sees
    for (int64_t b = 0; b < s.batch; b++)
        for (int64_t i = 0; i < s.nodes; i++) {
            const uint8_t* seen = mask + b * s.mask[0] + i * s.mask[1];
            for (int64_t t = s.slots; t > reach[b]; t--)
                if (seen[t - 1]) reach[b] = t;
        }
    std::unique_ptr<float[]> scores(new float[s.batch * s.heads * s.nodes * line]);  // (B, groups, queries, line)
    std::vector<float> totals(s.batch * s.heads * s.nodes);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> block(CHUNK * std::max(s.width, VALUE_LANES)), sums(queries * VALUE_LANES);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * chunks * s.groups; task++) {
            const int64_t g = task % s.groups, c = task / s.groups % chunks, b = task / s.groups / chunks;
            const int64_t start = c * CHUNK, count = std::min(CHUNK, reach[b] - start);
            if (count > 0)
                score(query + b * s.query[0] + g * share * s.query[1],
                      key + b * s.key[0] + g * s.key[1] + start * s.key[2], scale, s, count, block.data(),
                      scores.get() + (b * s.groups + g) * queries * line + start, line);
        }
#pragma omp for
        for (int64_t place = 0; place < s.batch * s.heads * s.nodes; place++) {
            const int64_t b = place / queries / s.groups, i = place % s.nodes;
            totals[place] = weigh(scores.get() + place * line, mask + b * s.mask[0] + i * s.mask[1], reach[b]);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * s.groups * blocks; task++) {
            const int64_t first = task % blocks * VALUE_LANES, g = task / blocks % s.groups;
            const int64_t b = task / blocks / s.groups;
            const int64_t before = (b * s.groups + g) * queries;
            sum_values(value + b * s.value[0] + g * s.value[1], s, first, reach[b], scores.get() + before * line, line,
                       block.data(), sums.data());
            for (int64_t j = 0; j < queries; j++) {  // out is (B, n, H, Dv)
                const int64_t h = g * share + j / s.nodes, i = j % s.nodes;
                Number* place = out + ((b * s.nodes + i) * s.heads + h) * s.value_width;
                const float total = totals[before + j];
                for (int64_t d = first; d < std::min(first + VALUE_LANES, s.value_width); d++)
                    put(place + d, total == 0 ? 0.0f : sums[j * VALUE_LANES + d - first] / total);
            }
        }
    }
}

}  // namespace

// `is_float32`: the numbers are, else bfloat16.
extern "C" void attend(const void* query, const void* key, const void* value, int is_float32, const uint8_t* mask,
                       float scale, void* out, const int64_t* sizes, int threads) {
    const auto go = [&](auto kind) {
        using Number = decltype(kind);
        attend((const Number*)query, (const Number*)key, (const Number*)value, mask, scale, (Number*)out,
               *(const Sizes*)sizes, threads);
    };
    is_float32 ? go(float()) : go(Short());
}
