// Products of a few rows with the weights of a linear layer, on a CPU.
//
// A decoding step is little else than reading weights. Here they lie in panels of some outputs, read once and in order,
// for all rows of a tile that stays in registers; where every weight is a bfloat16 (most checkpoints are), a panel holds
// just these 16 bits, which are exactly the float32 weights at half the reading. Numbers and sums are float32, and what
// a row gets does not depend on the other rows. Needs GCC 12 or Clang. Called by operators.cpp; knows nothing of torch.

#include "tile.h"

namespace {

constexpr int64_t BLOCK = 96;    // rows that stay in the L2 cache
constexpr int64_t GROUP = 4;     // panels that stay there with them
constexpr int64_t AHEAD = 2048;  // bytes

template <typename Weight>
constexpr int64_t STEP = std::is_same_v<Weight, float> ? PANEL : LANES;  // from one input of a panel to the next

// ROWS rows by PANELS panels, of which `count` outputs are kept.
template <int ROWS, int PANELS, typename Weight>
void tile(const float* x, const Weight* panels, const float* bias, int64_t inputs, int64_t outputs, int64_t count,
          float* out) {
    Vector sums[ROWS][PANELS][2];
    multiply<ROWS, PANELS>(x, inputs, panels, STEP<Weight>, inputs * STEP<Weight>, inputs, AHEAD, sums);
    for (int r = 0; r < ROWS; r++) {
        float row[PANELS * PANEL];
        std::memcpy(row, sums[r], sizeof(row));
        for (int64_t i = 0; i < count; i++) out[r * outputs + i] = bias ? row[i] + bias[i] : row[i];
    }
}

// ROWS rows by the panels from `first` to before `last`: of few rows, several panels at a time, which leaves registers for
// what is multiplied.
template <int ROWS, typename Weight>
void tiles(const float* x, const Weight* panels, const float* bias, int64_t inputs, int64_t outputs, int64_t first,
           int64_t last, float* out) {
    constexpr int WIDE = std::clamp(MOST / (ROWS + 1), 1, 4);
    const auto go = [&](auto wide, int64_t p) {
        const int64_t count = std::min<int64_t>(wide * PANEL, outputs - p * PANEL);
        tile<ROWS, wide>(x, panels + p * inputs * STEP<Weight>, bias ? bias + p * PANEL : nullptr, inputs, outputs,
                         count, out + p * PANEL);
    };
    int64_t p = first;
    for (; p + WIDE <= last; p += WIDE) go(std::integral_constant<int, WIDE>(), p);
    for (; p < last; p++) go(std::integral_constant<int, 1>(), p);
}

template <typename Weight>
void linear(const float* x, const Weight* panels, const float* bias, float* out, int64_t rows, int64_t inputs,
            int64_t outputs, int threads) {
    const int64_t count = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        const int64_t end = count * (part + 1) / threads;
        for (int64_t start = 0; start < rows; start += BLOCK)
            for (int64_t first = count * part / threads; first < end; first += GROUP)
                in_tiles(std::min(BLOCK, rows - start), [&](auto tile_rows, int64_t from) {
                    tiles<tile_rows>(x + (start + from) * inputs, panels, bias, inputs, outputs, first,
                                     std::min(end, first + GROUP), out + (start + from) * outputs);
                });
    }
}

}  // namespace

extern "C" int panel_outputs() { return PANEL; }

// out (rows, outputs) of x (rows, inputs); `is_bfloat16`: the weights, of which a panel then holds the upper 16 bits.
extern "C" void linear(const float* x, const void* panels, int is_bfloat16, const float* bias, float* out, int64_t rows,
                       int64_t inputs, int64_t outputs, int threads) {
    if (is_bfloat16)
        linear(x, (const Halves*)panels, bias, out, rows, inputs, outputs, threads);
    else
        linear(x, (const float*)panels, bias, out, rows, inputs, outputs, threads);
}
