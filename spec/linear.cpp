// Products of a few rows with the weights of a linear layer, on a CPU.
//
// A decoding step is little else than reading weights. Here they lie in panels of some outputs, read once and in order,
// for all rows of a tile that stays in registers; where every weight is a bfloat16 (most checkpoints are), a panel holds
// just these 16 bits, which are exactly the float32 weights at half the reading. Numbers and sums are float32.
//
// What a row gets is, bit by bit, the same whatever the other rows and their number: every sum is taken in the order of
// the inputs. Needs GCC 12 or Clang. Compiled and called by native.py; knows nothing of torch.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, REGISTERS = 24;  // numbers of a vector; vectors of sums
#else
constexpr int LANES = 8, REGISTERS = 12;
#endif
constexpr int PANEL = 2 * LANES;       // outputs
constexpr int MOST = REGISTERS / 2;    // rows of a tile
constexpr int64_t BLOCK = 96;          // rows that stay in the L2 cache
constexpr int64_t GROUP = 4;           // panels that stay there with them
constexpr int64_t AHEAD = 2048;        // bytes that weights are fetched ahead of their use

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

// The weights of one input for the two halves of a panel: float32 one after the other, or each half's bfloat16 in the
// lower and the upper 16 bits.
inline void read(const float* from, Vector& first, Vector& second) {
    std::memcpy(&first, from, sizeof(Vector));
    std::memcpy(&second, from + LANES, sizeof(Vector));
}

inline void read(const uint32_t* from, Vector& first, Vector& second) {
    Bits both;
    std::memcpy(&both, from, sizeof(Bits));
    first = (Vector)(both << 16), second = (Vector)(both & 0xffff0000u);
}

template <typename Weight>
constexpr int64_t STRIDE = std::is_same_v<Weight, float> ? PANEL : LANES;  // from one input of a panel to the next

// ROWS rows by PANELS panels, of which `count` outputs are kept.
template <typename Weight, int ROWS, int PANELS>
void tile(const float* x, const Weight* panels, const float* bias, int64_t inputs, int64_t outputs, int64_t count,
          float* out) {
    constexpr int64_t stride = STRIDE<Weight>;
    Vector sums[ROWS][PANELS][2] = {};
    for (int64_t k = 0; k < inputs; k++) {
        for (int p = 0; p < PANELS; p++) {
            Vector first, second;
            const Weight* place = panels + (p * inputs + k) * stride;
            for (int64_t line = 0; line < stride * int64_t(sizeof(Weight)); line += 64)
                __builtin_prefetch((const char*)place + AHEAD + line);
            read(place, first, second);
            for (int r = 0; r < ROWS; r++) {
                const float number = x[r * inputs + k];
                sums[r][p][0] += number * first;
                sums[r][p][1] += number * second;
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float row[PANELS * PANEL];
        std::memcpy(row, sums[r], sizeof(row));
        for (int64_t i = 0; i < count; i++) out[r * outputs + i] = bias ? row[i] + bias[i] : row[i];
    }
}

// ROWS rows by the panels from `first` to before `last`: of few rows, several panels at a time.
template <typename Weight, int ROWS>
void tiles(const float* x, const Weight* panels, const float* bias, int64_t inputs, int64_t outputs, int64_t first,
           int64_t last, float* out) {
    constexpr int WIDE = std::clamp(MOST / ROWS, 1, 4);
    const auto go = [&](auto wide, int64_t p) {
        const int64_t count = std::min<int64_t>(wide * PANEL, outputs - p * PANEL);
        tile<Weight, ROWS, wide>(x, panels + p * inputs * STRIDE<Weight>, bias ? bias + p * PANEL : nullptr, inputs,
                                 outputs, count, out + p * PANEL);
    };
    int64_t p = first;
    for (; p + WIDE <= last; p += WIDE) go(std::integral_constant<int, WIDE>(), p);
    for (; p < last; p++) go(std::integral_constant<int, 1>(), p);
}

template <typename Weight, int ROWS = MOST, typename... Rest>
void tiles_of(int64_t rows, Rest... rest) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return tiles_of<Weight, ROWS - 1>(rows, rest...);
    tiles<Weight, ROWS>(rest...);
}

template <typename Weight>
void multiply(const float* x, const Weight* panels, const float* bias, float* out, int64_t rows, int64_t inputs,
              int64_t outputs, int threads) {
    const int64_t count = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        const int64_t end = count * (part + 1) / threads;
        for (int64_t start = 0; start < rows; start += BLOCK) {
            const int64_t block = std::min(BLOCK, rows - start), cuts = (block + MOST - 1) / MOST;
            for (int64_t first = count * part / threads; first < end; first += GROUP)
                for (int64_t cut = 0; cut < cuts; cut++) {  // into tiles of as equal a size as can be
                    const int64_t from = start + block * cut / cuts, to = start + block * (cut + 1) / cuts;
                    tiles_of<Weight>(to - from, x + from * inputs, panels, bias, inputs, outputs, first,
                                     std::min(end, first + GROUP), out + from * outputs);
                }
        }
    }
}

}  // namespace

extern "C" int panel_outputs() { return PANEL; }

// out (rows, outputs) of x (rows, inputs); `is_bfloat16`: the weights, of which a panel then holds the upper 16 bits.
extern "C" void linear(const float* x, const void* panels, int is_bfloat16, const float* bias, float* out, int64_t rows,
                       int64_t inputs, int64_t outputs, int threads) {
    if (is_bfloat16)
        multiply(x, (const uint32_t*)panels, bias, out, rows, inputs, outputs, threads);
    else
        multiply(x, (const float*)panels, bias, out, rows, inputs, outputs, threads);
}
