#include "problem.h"

#include <algorithm>
#include <cstring>

namespace nemo {

using nvinfer1::DataType;

namespace {

struct DtypeName {
    DataType type;
    char const* triton;
    char const* plain;
    int bytes;
};

constexpr DtypeName kDtypeNames[] = {
    {DataType::kFLOAT, "fp32", "float32", 4}, {DataType::kHALF, "fp16", "float16", 2},
    {DataType::kBF16, "bf16", "bfloat16", 2}, {DataType::kFP8, "fp8e4nv", "float8_e4m3fn", 1},
    {DataType::kINT32, "i32", "int32", 4},    {DataType::kINT64, "i64", "int64", 8},
    {DataType::kINT8, "i8", "int8", 1},
};

DtypeName const& names_of(DataType type) {
    for (DtypeName const& row : kDtypeNames) {
        if (row.type == type) return row;
    }
    throw PluginError("does not support TensorRT dtype " + std::to_string(static_cast<int>(type)));
}

std::string shape_text(nvinfer1::Dims const& dims) {
    std::string text = "[";
    for (int i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "") + std::to_string(dims.d[i]);
    return text + "]";
}

std::string axes_text(TensorRow const& row) {
    std::string text = "[";
    for (Axis const& axis : row.axes) {
        text += text.size() > 1 ? ", " : "";
        text += axis.name ? axis.name : "";
        if (!axis.name) text += std::to_string(axis.offset);
        else if (axis.offset) text += (axis.offset > 0 ? "+" : "") + std::to_string(axis.offset);
    }
    return text + "]";
}

}  // namespace

char const* triton_name(DataType type) { return names_of(type).triton; }
char const* plain_name(DataType type) { return names_of(type).plain; }
int64_t num_bytes(DataType type) { return names_of(type).bytes; }

std::vector<DataType> dtype_variables(OpRow const& op, DataType const* inputs, int count) {
    if (count != op.inputs.count) {
        throw PluginError("has " + std::to_string(count) + " inputs, expected " + std::to_string(op.inputs.count));
    }
    std::vector<DataType> found(static_cast<size_t>(op.dtypes.count), DataType::kINT32);
    std::vector<char const*> first(found.size(), nullptr);
    for (int i = 0; i < count; ++i) {
        TensorRow const& row = op.inputs[i];
        auto const refuse = [&](std::string const& why) {
            throw PluginError(std::string(row.name) + " is " + plain_name(inputs[i]) + ", " + why);
        };
        if (row.variable < 0) {
            if (inputs[i] != row.literal) refuse(std::string("expected ") + plain_name(row.literal));
            continue;
        }
        auto const variable = static_cast<size_t>(row.variable);
        if (first[variable] && found[variable] != inputs[i]) {
            refuse(std::string("expected ") + first[variable] + "'s " + plain_name(found[variable]));
        }
        found[variable] = inputs[i];
        first[variable] = row.name;
        List<DataType> const& allowed = op.dtypes[row.variable].allowed;
        if (std::find(allowed.begin(), allowed.end(), inputs[i]) == allowed.end()) {
            refuse(std::string("which ") + op.name + " does not support");
        }
    }
    return found;
}

Problem::Problem(OpRow const& op_, std::vector<Attribute> const& attributes_, std::vector<Tensor> const& inputs)
    : op(op_), attributes(attributes_) {
    std::vector<DataType> types;
    for (Tensor const& tensor : inputs) types.push_back(tensor.type);
    types_ = dtype_variables(op, types.data(), static_cast<int>(types.size()));
    for (int i = 0; i < op.inputs.count; ++i) read(op.inputs[i], inputs[static_cast<size_t>(i)]);
}

void Problem::read(TensorRow const& row, Tensor const& tensor) {
    auto const refuse = [&](std::string const& why) {
        throw PluginError(std::string(row.name) + " has shape " + shape_text(tensor.dims) + ", expected " +
                          axes_text(row) + why);
    };
    if (tensor.dims.nbDims != row.axes.count) refuse("");
    for (int i = 0; i < row.axes.count; ++i) {
        Axis const& axis = row.axes[i];
        int64_t const size = tensor.dims.d[i];
        if (size < 0) refuse(" with known sizes");
        if (axis.name ? size < axis.offset : size != axis.offset) refuse("");
        if (!axis.name) continue;
        int64_t const* known = find(axis.name);
        if (!known) {
            sizes_.emplace_back(axis.name, size - axis.offset);
        } else if (size != *known + axis.offset) {
            refuse(std::string(" with ") + axis.name + " = " + std::to_string(*known));
        }
    }
}

int64_t const* Problem::find(char const* axis) const {
    for (auto const& [name, size] : sizes_) {
        if (!std::strcmp(name, axis)) return &size;
    }
    return nullptr;
}

int64_t Problem::operator[](char const* name) const {
    if (int64_t const* size = find(name)) return *size;
    for (int i = 0; i < op.attributes.count; ++i) {
        AttributeRow const& row = op.attributes[i];
        if (!row.is_float && !std::strcmp(row.name, name)) return attributes[static_cast<size_t>(i)].integer;
    }
    throw std::logic_error(std::string(op.name) + " has no axis or integer attribute " + name);
}

float Problem::real(char const* attribute) const {
    for (int i = 0; i < op.attributes.count; ++i) {
        AttributeRow const& row = op.attributes[i];
        if (row.is_float && !std::strcmp(row.name, attribute)) return attributes[static_cast<size_t>(i)].real;
    }
    throw std::logic_error(std::string(op.name) + " has no float attribute " + attribute);
}

DataType Problem::type(char const* variable) const {
    for (int i = 0; i < op.dtypes.count; ++i) {
        if (!std::strcmp(op.dtypes[i].name, variable)) return types_[static_cast<size_t>(i)];
    }
    throw std::logic_error(std::string(op.name) + " has no dtype variable " + variable);
}

DataType Problem::type(TensorRow const& row) const {
    return row.variable < 0 ? row.literal : types_[static_cast<size_t>(row.variable)];
}

namespace {

[[noreturn]] void refuse(char const* name, std::string const& allowed, int64_t value) {
    throw PluginError(std::string("the kernels require ") + name + " " + allowed + ", got " + std::to_string(value));
}

}  // namespace

void require_multiple(Problem const& problem, char const* name, int64_t factor) {
    int64_t const value = problem[name];
    if (value % factor) refuse(name, "to be a multiple of " + std::to_string(factor), value);
}

void require_range(Problem const& problem, char const* name, int64_t least, int64_t most) {
    int64_t const value = problem[name];
    if (value < least || value > most) {
        refuse(name, "to be from " + std::to_string(least) + " to " + std::to_string(most), value);
    }
}

void require_one_of(Problem const& problem, char const* name, std::initializer_list<int64_t> allowed) {
    int64_t const value = problem[name];
    if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return;
    std::string text;
    for (int64_t each : allowed) text += (text.empty() ? "to be one of " : ", ") + std::to_string(each);
    refuse(name, text, value);
}

}  // namespace nemo
