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
extern "C" void linear(const float* x, const void* panels, int is_bfloat16, const float* bias, float* out, int64_t rows,
                       int64_t inputs, int64_t outputs, int threads);

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

Tensor panel_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, int64_t outputs) {
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    const int64_t inputs = sizes.back(), rows = inputs ? x.numel() / inputs : 0;
    sizes.back() = outputs;
    Tensor out = empty(x, sizes);
    linear((const float*)x.const_data_ptr(), packed.const_data_ptr(), packed.scalar_type() == ScalarType::Int,
           bias ? (const float*)bias->const_data_ptr() : nullptr, (float*)out.mutable_data_ptr(), rows, inputs, outputs,
           torch::stable::get_num_threads());
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
    library.impl("panel_linear", TORCH_BOX(&panel_linear));
    library.impl("slot_attention", TORCH_BOX(&slot_attention));
}
