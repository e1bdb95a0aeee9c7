// The shapes, dtypes and attributes of one call of an op, checked against the SPEC.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tables.h"

namespace nemo {

// An unsupported input or a driver error; the message is logged to TensorRT's logger.
struct PluginError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Tensor {
    nvinfer1::Dims dims;
    nvinfer1::DataType type;
};

// An attribute's value; the SPEC says which member is valid.
struct Attribute {
    int32_t integer{};
    float real{};
};

class Problem {
public:
    // Reads the size of each axis from the inputs' shapes. Throws PluginError, naming the tensor, on a mismatch.
    Problem(OpRow const& op, std::vector<Attribute> const& attributes, std::vector<Tensor> const& inputs);

    int64_t operator[](char const* name) const;  // the size of an axis, or an integer attribute
    float real(char const* attribute) const;
    nvinfer1::DataType type(char const* variable) const;
    nvinfer1::DataType type(TensorRow const& row) const;

    OpRow const& op;
    std::vector<Attribute> const& attributes;

private:
    void read(TensorRow const& row, Tensor const& tensor);
    int64_t const* find(char const* axis) const;

    std::vector<std::pair<char const*, int64_t>> sizes_;
    std::vector<nvinfer1::DataType> types_;  // by dtype variable
};

// Returns the dtype of each variable, from the inputs; throws PluginError if the SPEC does not allow it.
std::vector<nvinfer1::DataType> dtype_variables(OpRow const& op, nvinfer1::DataType const* inputs, int count);

// Throw PluginError if the kernels do not support a size or integer attribute.
void require_multiple(Problem const& problem, char const* name, int64_t factor);
void require_range(Problem const& problem, char const* name, int64_t least, int64_t most);
void require_one_of(Problem const& problem, char const* name, std::initializer_list<int64_t> allowed);

constexpr int64_t kMaxInt32 = INT32_MAX;

char const* triton_name(nvinfer1::DataType type);  // fp16
char const* plain_name(nvinfer1::DataType type);   // float16
int64_t num_bytes(nvinfer1::DataType type);

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace nemo
