// attention.cpp and linear.cpp as torch's operators, by its stable interface (torch 2.10 or later).
//
// A step has hundreds of small products, and an operator in Python takes longer than some of them. The schemas and what
// tracing needs stand in native.py, which compiles and loads this.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern "C" void attend(const void* query, const void* key, const void* value, int is_float32, const uint8_t* mask,
                       float scale, void* out, const int64_t* sizes, int threads);
extern "C" void multiply_layers(const void* x, int bfloat16, int64_t rows, int64_t inputs, int64_t layers,
                        const void* const* panels, const int64_t* outputs, void* const* out, const int64_t* format,
                        int threads);

extern "C" void rotate_rows(const void* x, int bfloat16, const int8_t* signs, int64_t block, float scale, int64_t rows,
                            int64_t inputs, void* out, int threads);

namespace {

// A new contiguous tensor like `other` but for its sizes.
Tensor empty(const Tensor& other, const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
    int32_t dtype, device;
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(other.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &device));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device, 0, &made));
    return Tensor(made);
}

std::vector<Tensor> linears(Tensor x, std::vector<Tensor> packed, std::vector<int64_t> outputs,
                            std::vector<int64_t> format) {
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    const int64_t inputs = sizes.back(), rows = inputs ? x.numel() / inputs : 0, bits = format[0];
    std::vector<Tensor> out;
    std::vector<const void*> panels;
    std::vector<void*> results;
    for (size_t i = 0; i < packed.size(); i++) {
        sizes.back() = outputs[i];
        out.push_back(empty(x, sizes));
        panels.push_back(packed[i].const_data_ptr());
        results.push_back(out[i].mutable_data_ptr());
    }
    for (size_t first = 0, last; first < packed.size(); first = last) {  // those of one dtype together
        for (last = first + 1; last < packed.size() && packed[last].scalar_type() == packed[first].scalar_type();) last++;
        format[0] = packed[first].scalar_type() == ScalarType::Float ? 32 : bits;
        multiply_layers(x.const_data_ptr(), x.scalar_type() == ScalarType::BFloat16, rows, inputs, int64_t(last - first),
                panels.data() + first, outputs.data() + first, results.data() + first, format.data(),
                torch::stable::get_num_threads());
    }
    return out;
}

Tensor rotate(Tensor x, Tensor signs, int64_t block, double scale) {
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    Tensor out = empty(x, sizes);
    const int64_t inputs = sizes.back();
    rotate_rows(x.const_data_ptr(), x.scalar_type() == ScalarType::BFloat16, (const int8_t*)signs.const_data_ptr(), block,
                scale, inputs ? x.numel() / inputs : 0, inputs, out.mutable_data_ptr(), torch::stable::get_num_threads());
    return out;
}

Tensor slot_attention(Tensor query, Tensor key, Tensor value, Tensor mask, double scale) {
    const int64_t batch = query.size(0), heads = query.size(1), nodes = query.size(2), width = value.size(3);
    Tensor out = empty(query, {batch, nodes, heads, width});
    std::vector<int64_t> layout{batch, heads, key.size(1), nodes, key.size(2), query.size(3), width};
    for (const Tensor* tensor : {&query, &key, &value})
        for (int64_t dim = 0; dim < 3; dim++) layout.push_back(tensor->stride(dim));
    layout.push_back(mask.stride(0)), layout.push_back(mask.stride(2));
    attend(query.const_data_ptr(), key.const_data_ptr(), value.const_data_ptr(),
           query.scalar_type() == ScalarType::Float, (const uint8_t*)mask.const_data_ptr(), scale,
           out.mutable_data_ptr(), layout.data(), torch::stable::get_num_threads());
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paceline, CPU, library) {
    library.impl("linears", TORCH_BOX(&linears));
    library.impl("rotate", TORCH_BOX(&rotate));
    library.impl("slot_attention", TORCH_BOX(&slot_attention));
}
