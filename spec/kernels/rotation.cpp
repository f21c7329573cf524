// The rotation of a layer's inputs (rotation.py): signs, then a Hadamard transform of each block, in float32.
//
// The same sums and differences in the same order as there, row by row. Called by operators.cpp; knows nothing of torch.

#include <vector>

#include "vectors.h"

namespace {

void transform(float* x, int64_t block) {
    for (int64_t half = 1; half < block; half *= 2)
        for (int64_t start = 0; start < block; start += 2 * half)
            for (int64_t i = start; i < start + half; i++) {
                const float first = x[i], second = x[i + half];
                x[i] = first + second, x[i + half] = first - second;
            }
}

}  // namespace

// out (rows, inputs) of x (rows, inputs), float32 or bfloat16 both; `scale` is what the transform is multiplied by.
extern "C" void rotate_rows(const void* x, int bfloat16, const int8_t* signs, int64_t block, float scale, int64_t rows,
                            int64_t inputs, void* out, int threads) {
#pragma omp parallel for num_threads(rows * inputs < 32768 ? 1 : threads)
    for (int64_t r = 0; r < rows; r++) {
        std::vector<float> row(inputs);
        for (int64_t k = 0; k < inputs; k++) {
            const int64_t at = r * inputs + k;
            row[k] = (bfloat16 ? from_bfloat16(((const uint16_t*)x)[at]) : ((const float*)x)[at]) * signs[k];
        }
        for (int64_t start = 0; start < inputs; start += block) transform(row.data() + start, block);
        for (int64_t k = 0; k < inputs; k++) {
            const float number = row[k] * scale;
            const int64_t at = r * inputs + k;
            if (bfloat16)
                ((uint16_t*)out)[at] = to_bfloat16(number);
            else
                ((float*)out)[at] = number;
        }
    }
}
