// Products of a few rows with the weights of linear layers that share them, on a CPU.
//
// A decoding step is little else than reading weights. Here they lie in panels (products.h), read once and in order, for
// all rows of a tile that stays in registers. Threads take panels, so that their number changes no sum. Needs GCC 12 or
// Clang. Called by operators.cpp; knows nothing of torch.

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "rows.h"

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

// Rows of a tile: what the registers hold beside weights; some kinds sum each group by itself, too.
template <typename Kind>
constexpr int64_t MOST = (Kind::sums_groups ? 8 : 12) * LANES / 16;

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

// Calls work(from, count) for tiles of as equal a size as can be, at most `most`, of the rows from `block` on.
template <typename Work>
void in_tiles(int64_t block, int64_t rows, int64_t most, Work work) {
    const int64_t cuts = (rows + most - 1) / most;
    for (int64_t cut = 0; cut < cuts; cut++)
        work(block + rows * cut / cuts, rows * (cut + 1) / cuts - rows * cut / cuts);
}

template <typename Kind>
void some_panels(const Call& call, const Layer& layer, int64_t first, int64_t last) {
    if constexpr (Kind::expands)
        if (call.count > 24) {
            static thread_local std::vector<char> expanded;
            expanded.resize(Kind::expanded_bytes(call.inputs));
            for (; first < last; first++) {
                Kind::expand(layer.panels + first * panel_bytes(call.format, call.inputs), call.inputs, call.format,
                             expanded.data());
                constexpr int64_t most = MOST<typename Kind::Expanded>;
                in_tiles(0, call.count, most, [&](int64_t from, int64_t count) {  // all are large
                    tiles<typename Kind::Expanded, most, most * 3 / 4>(call, layer, from, count, first, first + 1,
                                                                       expanded.data());
                });
            }
            return;
        }
    for (int64_t block = 0; block < call.count; block += BLOCK)
        for (int64_t turn = first; turn < last; turn += TURN)
            in_tiles(block, std::min(BLOCK, call.count - block), MOST<Kind>, [&](int64_t from, int64_t count) {
                const int64_t end = std::min(last, turn + TURN);
                if constexpr (MOST<Kind> == 12) return tiles<Kind, 12, 8, 6, 4, 2, 1>(call, layer, from, count, turn, end);
                if constexpr (MOST<Kind> == 8) return tiles<Kind, 8, 6, 4, 2, 1>(call, layer, from, count, turn, end);
                if constexpr (MOST<Kind> == 6) return tiles<Kind, 6, 4, 2, 1>(call, layer, from, count, turn, end);
                if constexpr (MOST<Kind> == 4) return tiles<Kind, 4, 2, 1>(call, layer, from, count, turn, end);
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
