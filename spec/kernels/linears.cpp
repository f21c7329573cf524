// Products of a few rows with the weights of linear layers that share them, on a CPU.
//
// A decoding step is little else than reading weights. Here they lie in panels (products.h), read once and in order, for
// all rows of a tile that stays in registers. Threads take panels, so that their number changes no sum. Needs GCC 12 or
// Clang. Called by operators.cpp; knows nothing of torch.

#include <algorithm>
#include <vector>

#include "products.h"

namespace {

constexpr int64_t BLOCK = 96;  // rows that stay in the L2 cache with the panels of a turn
constexpr int64_t TURN = 4;    // panels
constexpr int64_t LITTLE = 16384;  // numbers that one thread prepares faster than several

struct Layer {
    const char* panels;
    void* out;  // (rows, outputs), in the rows' own dtype
    int64_t outputs;
};

struct Call {
    Rows rows;
    int64_t count, inputs;
    Format format;
    bool bfloat16;  // what `out` is
};

#ifdef __AVX512F__
constexpr int64_t MOST = 12;  // rows of a tile
#else
constexpr int64_t MOST = 6;
#endif

// The products of ROWS rows, of which `count` are wanted, with PANELS panels.
template <int ROWS, int PANELS, typename Kind>
void tile(const Call& call, const Layer& layer, int64_t from, int64_t count, int64_t panel, const char* expanded) {
    const int64_t bytes = panel_bytes(call.format, call.inputs);
    const Panels panels{layer.panels + panel * bytes, bytes, expanded};
    int index[ROWS];
    for (int r = 0; r < ROWS; r++) index[r] = int(from + std::min<int64_t>(r, count - 1));
    Sums<ROWS, PANELS> sums = {};
    Kind::template multiply<ROWS, PANELS>(call.rows, index, panels, call.inputs, call.format, sums);
    for (int r = 0; r < count; r++)
        for (int p = 0; p < PANELS; p++) {
            float row[PANEL];
            const char* bias = panels.at(p + 1) - PANEL * 4;
            for (int half = 0; half < 2; half++) {
                const Vector sum = sums[r][p][half] + load<Vector>(bias + half * sizeof(Vector));
                std::memcpy(row + half * LANES, &sum, sizeof(sum));
            }
            const int64_t start = (panel + p) * PANEL, kept = std::min<int64_t>(PANEL, layer.outputs - start);
            const int64_t to = (from + r) * layer.outputs + start;
            if (call.bfloat16)
                for (int64_t i = 0; i < kept; i++) ((uint16_t*)layer.out)[to + i] = to_bfloat16(row[i]);
            else
                std::memcpy((float*)layer.out + to, row, kept * sizeof(float));
        }
}

// `count` rows, at most ROWS, by the panels from `first` to before `last`, in the smallest tile that holds them.
template <typename Kind, int ROWS, int... LESS>
void tiles(const Call& call, const Layer& layer, int64_t from, int64_t count, int64_t first, int64_t last,
           const char* expanded = nullptr) {
    if constexpr (sizeof...(LESS) > 0) {
        constexpr int next[] = {LESS...};
        if (count <= next[0]) return tiles<Kind, LESS...>(call, layer, from, count, first, last, expanded);
    }
    if constexpr (ROWS <= 4)  // two panels at a time: more products that do not wait for one another
        for (; first + 2 <= last; first += 2) tile<ROWS, 2, Kind>(call, layer, from, count, first, expanded);
    for (; first < last; first++) tile<ROWS, 1, Kind>(call, layer, from, count, first, expanded);
}

// Calls work(from, count) for tiles of as equal a size as can be of the rows from `block` on.
template <typename Work>
void in_tiles(int64_t block, int64_t rows, Work work) {
    const int64_t cuts = (rows + MOST - 1) / MOST;
    for (int64_t cut = 0; cut < cuts; cut++)
        work(block + rows * cut / cuts, rows * (cut + 1) / cuts - rows * cut / cuts);
}

template <typename Kind>
void some_panels(const Call& call, const Layer& layer, int64_t first, int64_t last) {
    if constexpr (Kind::expands)
        if (call.count > 2 * MOST) {
            static thread_local std::vector<char> expanded;
            expanded.resize(Kind::expanded_bytes(call.inputs));
            for (; first < last; first++) {
                Kind::expand(layer.panels + first * panel_bytes(call.format, call.inputs), call.inputs, call.format,
                             expanded.data());
                in_tiles(0, call.count, [&](int64_t from, int64_t count) {  // all are large
                    tiles<typename Kind::Expanded, MOST, MOST * 2 / 3>(call, layer, from, count, first, first + 1,
                                                                       expanded.data());
                });
            }
            return;
        }
    for (int64_t block = 0; block < call.count; block += BLOCK)
        for (int64_t turn = first; turn < last; turn += TURN)
            in_tiles(block, std::min(BLOCK, call.count - block), [&](int64_t from, int64_t count) {
                const int64_t end = std::min(last, turn + TURN);
#ifdef __AVX512F__
                tiles<Kind, 12, 8, 6, 4, 2, 1>(call, layer, from, count, turn, end);
#else
                tiles<Kind, 6, 4, 2, 1>(call, layer, from, count, turn, end);
#endif
            });
}

// The share of thread `part` of `parts` in the panels of all layers.
template <typename Kind>
void share(const Call& call, const std::vector<Layer>& layers, int part, int parts) {
    int64_t all = 0, before = 0;
    for (const Layer& layer : layers) all += (layer.outputs + PANEL - 1) / PANEL;
    const int64_t first = all * part / parts, last = all * (part + 1) / parts;
    for (const Layer& layer : layers) {
        const int64_t panels = (layer.outputs + PANEL - 1) / PANEL;
        const int64_t from = std::max(first, before) - before, to = std::min(last, before + panels) - before;
        if (from < to) some_panels<Kind>(call, layer, from, to);
        before += panels;
    }
}

void share(const Call& call, const std::vector<Layer>& layers, int part, int parts, bool pairs) {
    const Format& f = call.format;
    if (f.int8) return (f.bits == 4 ? share<BlocksInt8<4>> : share<BlocksInt8<8>>)(call, layers, part, parts);
#ifdef __AVX512BF16__
    if (pairs && f.bits == 16) return share<Dense16Dot>(call, layers, part, parts);
    if (pairs) return (f.bits == 4 ? share<BlocksDot<4>> : share<BlocksDot<8>>)(call, layers, part, parts);
#endif
    if (f.bits == 32) return share<Dense32>(call, layers, part, parts);
    if (f.bits == 16) return share<Dense16>(call, layers, part, parts);
    return (f.bits == 4 ? share<Blocks<4>> : share<Blocks<8>>)(call, layers, part, parts);
}

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

// The sums of the groups of a row, each in the order of the inputs.
void sum_groups(const void* x, bool bfloat16, int64_t row, int64_t inputs, int64_t group, float* sums) {
    for (int64_t g = 0; g < inputs / group; g++) {
        float sum = 0;
        for (int64_t k = 0; k < group; k++) sum += at(x, bfloat16, row * inputs + g * group + k);
        sums[g] = sum;
    }
}

// A row in 8 bits. A group with a number that is not finite gets a scale of NaN.
void round_row(const float* x, int64_t inputs, int64_t group, int8_t* bytes, float* scales, float* sums,
               int32_t* wholes) {
    for (int64_t g = 0; g < inputs / group; g++, x += group, bytes += group) {
        Vector highest = {}, nothing = {};
        for (int64_t k = 0; k < group; k += LANES) {
            const Vector numbers = load<Vector>(x + k), size = (Vector)((Bits)numbers & 0x7fffffffu);
            highest = size > highest ? size : highest;
            nothing += numbers * 0.0f;
        }
        float most = 0, nan = 0;
        for (int i = 0; i < LANES; i++) most = std::max(most, highest[i]), nan += nothing[i];
        const float scale = nan == 0 ? most / 127.0f : 0.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
        int32_t whole = 0;
        for (int64_t k = 0; k < group; k += LANES) {
            const Ints rounded = nearest(nan == 0 ? load<Vector>(x + k) * inverse : Vector{});
            for (int i = 0; i < LANES; i++) {
                const int32_t byte = std::clamp(rounded[i], -127, 127);
                const int order[4] = {0, 2, 1, 3};
                bytes[k + i / 4 * 4 + order[i % 4]] = int8_t(byte);
                whole += byte;
            }
        }
        scales[g] = scale + nan, wholes[g] = whole, sums[g] = scales[g] * float(whole);
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
        widened = bfloat16 && !pairs;
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
            round_row(made.numbers.empty() ? (const float*)x + r * inputs : made.numbers.data() + r * line, inputs, f.group,
                      made.bytes.data() + r * inputs, made.scales.data() + r * groups, made.sums.data() + r * groups,
                      made.wholes.data() + r * groups);
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

extern "C" int panel_outputs() { return PANEL; }

// out[i] (rows, outputs[i]) of x (rows, inputs) for each of `layers` layers, all packed as `format` says; `bfloat16`: x
// and out are, else float32.
extern "C" void multiply_layers(const void* x, int bfloat16, int64_t rows, int64_t inputs, int64_t layers,
                        const void* const* panels, const int64_t* outputs, void* const* out, const int64_t* format,
                        int threads) {
    Call call{{}, rows, inputs, *(const Format*)format, bool(bfloat16)};
    std::vector<Layer> all;
    for (int64_t i = 0; i < layers; i++) all.push_back({(const char*)panels[i], out[i], outputs[i]});
    bool pairs = false;
#ifdef __AVX512BF16__
    pairs = bfloat16 && !call.format.int8 && call.format.bits <= 16;
#endif
    Prepared made;
    Preparation preparation(x, bfloat16, pairs, rows, inputs, call.format, made);
    const bool needed = preparation.needed(), little = rows * inputs < LITTLE;
    if (needed && little)
        for (int64_t r = 0; r < rows; r++) preparation.row(r);
    call.rows = preparation.rows();
#pragma omp parallel num_threads(threads)
    {
        if (needed && !little) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) preparation.row(r);
        }
#pragma omp for schedule(static, 1)
        for (int part = 0; part < threads; part++) share(call, all, part, threads, pairs);
    }
}
