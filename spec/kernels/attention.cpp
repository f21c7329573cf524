// Attention of query tokens, those of a tree or a prompt, over a slot cache, on a CPU.
//
// Decoding attends with 1 to some dozens of queries to hundreds of slots, for which general kernels spend more on
// packing and on calls of matrix products than on arithmetic. Here every key is read once, for all queries of its
// group, and a row is read as far as one of its queries sees. A prompt is taken some queries at a time. Numbers are
// bfloat16 or float32, sums float32.
//
// What a query gets is, bit by bit, the same whatever the other queries, their number and the masked slots (of finite
// numbers) between those that it sees: so a tree of drafts that is small enough to come here is verified with the very
// numbers of plain decoding. Needs GCC 12 or Clang. Called by operators.cpp; knows nothing of torch.

#include <algorithm>
#include <cmath>
#include <vector>

#include "tile.h"

namespace {

constexpr int64_t CHUNK = 128;  // slots whose keys are laid out at a time
constexpr int64_t AHEAD = 16;   // slots whose values are fetched ahead of their use
constexpr int64_t MANY = 96;    // queries of a group of heads from which on a thread takes some queries from key to sum
constexpr int64_t NEAR = 200000;  // scores of such queries that stay in the L2 cache

typedef double Doubles __attribute__((vector_size(8 * LANES)));

inline float number(float x) { return x; }

inline float number(Short x) { return from_bfloat16(x); }

inline void put(float* to, float x) { *to = x; }

inline void put(Short* to, float x) { *to = to_bfloat16(x); }

struct Sizes {  // as operators.cpp lays them out; strides in numbers
    int64_t batch, heads, groups, nodes, slots, width, value_width;  // groups: heads of keys and values
    int64_t query[3], key[3], value[3], mask[2];  // strides of row, head and token; of row and query
};

template <int H, int... I>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
    const Vector low = __builtin_shufflevector(a, b, (I & H ? LANES + I - H : I)...);
    b = __builtin_shufflevector(a, b, (I & H ? LANES + I : I + H)...);
    a = low;
}

template <int H = LANES / 2>
inline void transpose(Vector* rows) {  // Eklundh's, step by step
    for (int i = 0; i < LANES; i++)
        if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_integer_sequence<int, LANES>());
    if constexpr (H > 1) transpose<H / 2>(rows);
}

// A chunk of keys as float32, panel after panel of slots: block[t / PANEL][d][t % PANEL]. What lies beyond `count`
// means nothing.
template <typename Number>
void read_keys(const Number* from, int64_t stride, int64_t count, int64_t width, float* block) {
    const int64_t whole = width / LANES * LANES;
    for (int64_t t = 0; t < count; t += LANES) {
        float* panel = block + t / PANEL * PANEL * width + t % PANEL;
        for (int64_t d = 0; d < whole; d += LANES) {
            Vector rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const Number* key = from + std::min(t + i, count - 1) * stride + d;
                __builtin_prefetch(key + LANES * stride);
                rows[i] = vector(key);
            }
            transpose(rows);
            for (int64_t i = 0; i < LANES; i++) std::memcpy(panel + (d + i) * PANEL, &rows[i], sizeof(Vector));
        }
        for (int64_t d = whole; d < width; d++)
            for (int64_t i = 0; i < LANES; i++)
                panel[d * PANEL + i] = number(from[std::min(t + i, count - 1) * stride + d]);
    }
}

// The products of `queries` (queries, width) with a chunk of `count` keys; a query's are `line` numbers apart.
template <typename Number>
void score(const float* query, int64_t queries, const Number* key, const Sizes& s, int64_t count, float* block,
           float* scores, int64_t line) {
    read_keys(key, s.key[2], count, s.width, block);
    for (int64_t t = 0; t < count; t += PANEL)
        in_tiles(queries, [&](auto rows, int64_t from) {
            Vector sums[rows][1][2];
            multiply<rows, 1>(query + from * s.width, s.width, block + t * s.width, PANEL, 0, s.width, 0, sums);
            for (int r = 0; r < rows; r++) std::memcpy(scores + (from + r) * line + t, sums[r], sizeof(sums[r]));
        });
}

inline Vector exponential(Vector x) {  // of x <= 0, to 2 units in the last place; NaN stays NaN
    const Vector least = Vector{} - 87.0f;
    x = x < least ? least : x;
    const Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2**23: to the nearest whole number
    const Vector f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = Vector{} + 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * (Vector)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// Which of the slots from `start` on are seen, as all bits or none.
inline Ints shown(const uint8_t* seen, int64_t start, int64_t count) {
    Bytes bytes = {};
    if (start + LANES <= count)
        std::memcpy(&bytes, seen + start, LANES);
    else
        std::memcpy(&bytes, seen + start, count - start);
    return widened(bytes) != 0;
}

// Scores to exponentials, 0 where nothing is seen; returns their sum. It does not depend on where among masked slots the
// others lie: what is added are multiples of 2**-36, whose sums float64 holds exactly up to 2**17.
float weigh(float* scores, const uint8_t* seen, int64_t count) {
    Vector highest = Vector{} - INFINITY;
    for (int64_t t = 0; t < count; t += LANES) {
        const Vector loaded = vector(scores + t);
        highest = shown(seen, t, count) & (loaded > highest) ? loaded : highest;
    }
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = std::max(top, highest[i]);
    Doubles sums = {};
    for (int64_t t = 0; t < count; t += LANES) {
        const Vector e = shown(seen, t, count) ? exponential(vector(scores + t) - top) : Vector{};
        std::memcpy(scores + t, &e, sizeof(e));
        sums += (__builtin_convertvector(e, Doubles) + 98304.0) - 98304.0;  // 1.5 * 2**(52 - 36)
    }
    double total = 0;
    for (int i = 0; i < LANES; i++) total += sums[i];
    return float(total);
}

// A panel of the sums of values, weighted, slot after slot, for each of `queries`.
template <typename Number>
void sum_values(const Number* value, int64_t step, int64_t reach, const float* weights, int64_t queries, int64_t line,
                float* out) {
    in_tiles(queries, [&](auto rows, int64_t from) {
        Vector sums[rows][1][2];
        multiply<rows, 1>(weights + from * line, line, value, step, 0, reach, AHEAD * step * sizeof(Number), sums);
        std::memcpy(out + from * PANEL, sums, sizeof(sums));
    });
}

// Queries of a row's group of heads: the query j is of head j / nodes, node first + j % nodes.
struct Queries {
    int64_t b, g, first, nodes;

    int64_t head(int64_t j, const Sizes& s) const { return g * (s.heads / s.groups) + j / nodes; }
    int64_t node(int64_t j) const { return first + j % nodes; }
};

// How many slots any of the queries sees.
int64_t reach_of(const uint8_t* mask, const Sizes& s, const Queries& q) {
    int64_t reach = 0;
    for (int64_t i = q.first + q.nodes - 1; i >= q.first; i--) {
        const uint8_t* seen = mask + q.b * s.mask[0] + i * s.mask[1];
        int64_t t = s.slots;
        for (uint64_t eight; t >= 8 && t - 8 >= reach; t -= 8) {
            std::memcpy(&eight, seen + t - 8, 8);
            if (eight) break;
        }
        for (; t > reach; t--)
            if (seen[t - 1]) reach = t;
    }
    return reach;
}

// The first `count` queries, scaled, in float32: (count, width).
template <typename Number>
void scale_queries(const Number* query, const Sizes& s, const Queries& q, int64_t count, float scale, float* scaled) {
    for (int64_t j = 0; j < count; j++) {
        const Number* from = query + q.b * s.query[0] + q.head(j, s) * s.query[1] + q.node(j) * s.query[2];
        for (int64_t d = 0; d < s.width; d++) scaled[j * s.width + d] = number(from[d]) * scale;
    }
}

// The weighted sums of values of `count` queries, from query `from` on, to `out` (B, n, H, Dv); `scores` become weights.
template <typename Number>
void sum_all_values(const Number* value, const uint8_t* mask, const Sizes& s, const Queries& q, int64_t from,
                    int64_t count, int64_t reach, float* scores, int64_t line, Number* out) {
    static thread_local std::vector<float> totals, sums, narrow;
    totals.resize(count), sums.resize(count * PANEL);
    for (int64_t j = 0; j < count; j++)
        totals[j] = weigh(scores + j * line, mask + q.b * s.mask[0] + q.node(from + j) * s.mask[1], reach);
    for (int64_t first = 0; first < s.value_width; first += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, s.value_width - first);
        const Number* start = value + q.b * s.value[0] + q.g * s.value[1] + first;
        if (width == PANEL) {
            sum_values(start, s.value[2], reach, scores, count, line, sums.data());
        } else {
            narrow.assign(reach * PANEL, 0.0f);
            for (int64_t t = 0; t < reach; t++)
                for (int64_t d = 0; d < width; d++) narrow[t * PANEL + d] = number(start[t * s.value[2] + d]);
            sum_values(narrow.data(), PANEL, reach, scores, count, line, sums.data());
        }
        for (int64_t j = 0; j < count; j++) {
            Number* to = out + ((q.b * s.nodes + q.node(from + j)) * s.heads + q.head(from + j, s)) * s.value_width;
            for (int64_t d = first; d < first + width; d++)
                put(to + d, totals[j] == 0 ? 0.0f : sums[j * PANEL + d - first] / totals[j]);
        }
    }
}

// Memory of a thread for at least `count` numbers: to take it anew costs more than a product.
inline float* room(std::vector<float>& kept, int64_t count) {
    if (int64_t(kept.size()) < count) kept.resize(count);
    return kept.data();
}

// Prompts: each thread takes some queries of a group of heads, whose scores stay in its cache until they are used.
template <typename Number>
void attend_many(const Number* query, const Number* key, const Number* value, const uint8_t* mask, float scale,
                 Number* out, const Sizes& s, int threads) {
    const int64_t share = s.heads / s.groups, line = (s.slots + CHUNK - 1) / CHUNK * CHUNK + 16;
    const int64_t most = std::max<int64_t>(1, std::clamp<int64_t>(NEAR / line, MANY / 4, MANY) / share);
    const int64_t blocks = (s.nodes + most - 1) / most, all = share * most;
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> kept[3];
        float *block = room(kept[0], CHUNK * s.width), *scaled = room(kept[1], all * s.width);
        float* scores = room(kept[2], all * line);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * s.batch * s.groups; task++) {
            const int64_t g = task % s.groups, b = task / s.groups % s.batch;
            const int64_t first = (blocks - 1 - task / s.groups / s.batch) * most;  // the longest ones begin
            const Queries some{b, g, first, std::min(most, s.nodes - first)};
            const int64_t queries = share * some.nodes, reach = reach_of(mask, s, some);
            scale_queries(query, s, some, queries, scale, scaled);
            for (int64_t start = 0; start < reach; start += CHUNK)
                score(scaled, queries, key + b * s.key[0] + g * s.key[1] + start * s.key[2], s,
                      std::min(CHUNK, reach - start), block, scores + start, line);
            sum_all_values(value, mask, s, some, 0, queries, reach, scores, line, out);
        }
    }
}

// First the scores, chunk by chunk of slots, then what each tile of queries sums; between the two, threads wait.
template <typename Number>
void attend(const Number* query, const Number* key, const Number* value, const uint8_t* mask, float scale,
            Number* out, const Sizes& s, int threads) {
    const int64_t queries = s.heads / s.groups * s.nodes;
    if (queries > MANY) return attend_many(query, key, value, mask, scale, out, s, threads);
    const int64_t chunks = (s.slots + CHUNK - 1) / CHUNK, cuts = (queries + MOST - 1) / MOST;
    const int64_t line = chunks * CHUNK + 16;  // rows 4096 bytes apart would push each other out of the L1 cache
    std::vector<int64_t> reach(s.batch);
    for (int64_t b = 0; b < s.batch; b++) reach[b] = reach_of(mask, s, {b, 0, 0, s.nodes});
    static thread_local std::vector<float> shared;
    float* scores = room(shared, s.batch * s.groups * queries * line);  // (B, groups, queries, line)
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> kept[2];
        float *block = room(kept[0], CHUNK * s.width), *scaled = room(kept[1], queries * s.width);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * chunks * s.groups; task++) {
            const int64_t g = task % s.groups, c = task / s.groups % chunks, b = task / s.groups / chunks;
            const int64_t start = c * CHUNK, count = std::min(CHUNK, reach[b] - start);
            if (count <= 0) continue;
            scale_queries(query, s, {b, g, 0, s.nodes}, queries, scale, scaled);
            score(scaled, queries, key + b * s.key[0] + g * s.key[1] + start * s.key[2], s, count, block,
                  scores + (b * s.groups + g) * queries * line + start, line);
        }
#pragma omp for schedule(static, 1)
        for (int64_t task = 0; task < s.batch * s.groups * cuts; task++) {
            const int64_t cut = task % cuts, g = task / cuts % s.groups, b = task / cuts / s.groups;
            const int64_t from = queries * cut / cuts, to = queries * (cut + 1) / cuts;
            sum_all_values(value, mask, s, {b, g, 0, s.nodes}, from, to - from, reach[b],
                           scores + ((b * s.groups + g) * queries + from) * line, line, out);
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
