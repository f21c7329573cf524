// Attention of a few query tokens over a long slot cache, on a CPU.
//
// Decoding attends with 1 to some dozens of queries to hundreds of slots, for which general kernels spend more on
// packing and on calls of matrix products than on arithmetic. Here every key is read once, for all queries of its
// group; a row is read as far as one of its queries sees; rows are cut into chunks so that all threads have work.
// Numbers are bfloat16, sums float32. Compiled and called by attention.py; knows nothing of torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int64_t CHUNK = 128;     // slots that one task reads
constexpr int64_t LANES = 64;      // sums that are held in registers
constexpr int64_t MAX_WIDTH = 512;  // numbers of a head

inline int64_t whole_lanes(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

using Number = uint16_t;  // a bfloat16

inline float number(Number x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void put(Number* place, float x) {  // rounded to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *place = std::isnan(x) ? 0x7fc0 : Number((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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

// A chunk of values as float32, by slot, in lines of whole lanes: block[t][d].
void read_values(const Number* from, int64_t stride, int64_t count, int64_t width, int64_t padded, float* block) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < width; d++) block[t * padded + d] = number(from[t * stride + d]);
}

// sums[i] += sum over j of weights[j] * block[j][i], for LANES numbers i: these stay in registers.
inline void accumulate(const float* weights, const float* block, int64_t count, int64_t stride, float* sums) {
    float own[LANES] = {};
    for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < LANES; i++) own[i] += weights[j] * block[j * stride + i];
    for (int64_t i = 0; i < LANES; i++) sums[i] = own[i];
}

// One chunk for the queries of one group: `part` gets, a query, the highest score, the sum of the exponentials and
// the sum of the values.
void attend_chunk(const Number* query, const Number* key, const Number* value, const uint8_t* mask, float scale,
                  const Sizes& s, int64_t count, float* block, float* scores, float* part) {
    const int64_t queries = s.heads / s.groups * s.nodes, padded = whole_lanes(s.value_width);
    float own[MAX_WIDTH];
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < s.value_width; d += 64 / sizeof(Number)) __builtin_prefetch(value + t * s.value[2] + d);
    read_keys(key, s.key[2], count, s.width, block);
    for (int64_t j = 0; j < queries; j++) {
        const Number* from = query + j / s.nodes * s.query[1] + j % s.nodes * s.query[2];
        for (int64_t d = 0; d < s.width; d++) own[d] = number(from[d]) * scale;
        for (int64_t t = 0; t < count; t += LANES) accumulate(own, block + t, s.width, CHUNK, scores + j * CHUNK + t);
    }
    read_values(value, s.value[2], count, s.value_width, padded, block);
    for (int64_t j = 0; j < queries; j++) {
        const uint8_t* seen = mask + j % s.nodes * s.mask[1];
        float *p = scores + j * CHUNK, *mine = part + j * (padded + 2);
        float highest = -INFINITY, total = 0;
        for (int64_t t = 0; t < count; t++) highest = seen[t] && p[t] > highest ? p[t] : highest;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < count; t++) {
            p[t] = seen[t] ? exponential(p[t] - highest) : 0.0f;
            total += p[t];
        }
        mine[0] = highest;
        mine[1] = total;
        for (int64_t d = 0; d < padded; d += LANES) accumulate(p, block + d, count, padded, mine + 2 + d);
    }
}

void attend(const Number* query, const Number* key, const Number* value, const uint8_t* mask, float scale,
            Number* out, const Sizes& s) {
    const int64_t share = s.heads / s.groups, queries = share * s.nodes, padded = whole_lanes(s.value_width);
    const int64_t line = padded + 2;  // of a query's part
    const int64_t chunks = (s.slots + CHUNK - 1) / CHUNK;
    std::vector<int64_t> reach(s.batch, 0);  // slots that any query of the row sees
    for (int64_t b = 0; b < s.batch; b++)
        for (int64_t i = 0; i < s.nodes; i++) {
            const uint8_t* seen = mask + b * s.mask[0] + i * s.mask[1];
            for (int64_t t = s.slots; t > reach[b]; t--)
                if (seen[t - 1]) reach[b] = t;
        }
    std::vector<float> parts(s.batch * s.groups * chunks * queries * line);
#pragma omp parallel
    {
        std::vector<float> block(CHUNK * std::max(s.width, padded)), scores(queries * CHUNK);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * s.groups * chunks; task++) {
            const int64_t g = task % s.groups, c = task / s.groups % chunks, b = task / s.groups / chunks;
            const int64_t count = std::min(CHUNK, reach[b] - c * CHUNK);
            if (count <= 0) continue;
            attend_chunk(query + b * s.query[0] + g * share * s.query[1],
                         key + b * s.key[0] + g * s.key[1] + c * CHUNK * s.key[2],
                         value + b * s.value[0] + g * s.value[1] + c * CHUNK * s.value[2],
                         mask + b * s.mask[0] + c * CHUNK, scale, s, count, block.data(), scores.data(),
                         parts.data() + task * queries * line);
        }
#pragma omp for
        for (int64_t place = 0; place < s.batch * s.nodes * s.heads; place++) {  // out is (B, n, H, Dv)
            const int64_t h = place % s.heads, i = place / s.heads % s.nodes, b = place / s.heads / s.nodes;
            const int64_t g = h / share, j = h % share * s.nodes + i;
            const float* first = parts.data() + ((b * chunks * s.groups + g) * queries + j) * line;
            float highest = -INFINITY, total = 0;
            for (int64_t c = 0; c < chunks; c++) {
                const float* part = first + c * s.groups * queries * line;
                if (part[1] != 0 && part[0] > highest) highest = part[0];
            }
            float* sums = block.data();
            std::fill(sums, sums + s.value_width, 0.0f);
            for (int64_t c = 0; c < chunks; c++) {
                const float* part = first + c * s.groups * queries * line;
                if (part[1] == 0) continue;  // nothing seen here
                const float weight = exponential(part[0] - highest);
                total += weight * part[1];
                for (int64_t d = 0; d < s.value_width; d++) sums[d] += weight * part[2 + d];
            }
            for (int64_t d = 0; d < s.value_width; d++)
                put(out + place * s.value_width + d, total == 0 ? 0.0f : sums[d] / total);
        }
    }
}

}  // namespace

extern "C" void attend_bfloat16(const void* query, const void* key, const void* value, const uint8_t* mask,
                                float scale, void* out, const int64_t* sizes) {
    attend((const Number*)query, (const Number*)key, (const Number*)value, mask, scale, (Number*)out,
           *(const Sizes*)sizes);
}
