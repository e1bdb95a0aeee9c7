#include "plugin.h"

#include <algorithm>
#include <exception>

#include "log.h"

namespace nemo {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

namespace {

template <class Desc, class Read>
std::vector<Tensor> tensors(Desc const* descs, int32_t count, Read read) {
    std::vector<Tensor> found;
    for (int32_t i = 0; i < count; ++i) found.push_back(read(descs[i]));
    return found;
}

std::vector<Tensor> tensors(PluginTensorDesc const* descs, int32_t count) {
    return tensors(descs, count, [](PluginTensorDesc const& desc) { return Tensor{desc.dims, desc.type}; });
}

bool same(Dims const& left, Dims const& right) {
    return left.nbDims == right.nbDims && std::equal(left.d, left.d + left.nbDims, right.d);
}

// An output axis has the size of the first input axis of the same name; no op computes a new size.
nvinfer1::IDimensionExpr const* size_of(OpRow const& op, TensorRow const& output, int axis,
                                        nvinfer1::DimsExprs const* inputs) {
    if (output.replaces >= 0) return inputs[output.replaces].d[axis];
    for (int i = 0; i < op.inputs.count; ++i) {
        for (int j = 0; j < op.inputs[i].axes.count; ++j) {
            Axis const& candidate = op.inputs[i].axes[j];
            Axis const& wanted = output.axes[axis];
            if (wanted.name && candidate.name && std::string(wanted.name) == candidate.name &&
                candidate.offset == wanted.offset) {
                return inputs[i].d[j];
            }
        }
    }
    throw std::logic_error(std::string(output.name) + " has an axis that no input has");
}

}  // namespace

Plugin::Plugin(OpRow const& op, std::string layer, std::vector<Attribute> attributes)
    : op_(op), layer_(std::move(layer)), attributes_(std::move(attributes)), fields_{} {
    for (int i = 0; i < op_.attributes.count; ++i) {
        AttributeRow const& row = op_.attributes[i];
        Attribute const& value = attributes_[static_cast<size_t>(i)];
        if (row.is_float) serialized_.emplace_back(row.name, &value.real, nvinfer1::PluginFieldType::kFLOAT32, 1);
        else serialized_.emplace_back(row.name, &value.integer, nvinfer1::PluginFieldType::kINT32, 1);
    }
    fields_.nbFields = static_cast<int32_t>(serialized_.size());
    fields_.fields = serialized_.data();
}

template <class Body>
bool Plugin::succeeds(Body const& body) const noexcept {
    try {
        body();
        return true;
    } catch (std::exception const& error) {
        log_error(op_.name, layer_, error.what());
        return false;
    }
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
    Plugin* copy = nullptr;
    succeeds([&] { copy = new Plugin(*this); });
    return copy;
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs, DataType const* input_types,
                                   int32_t num_inputs) const noexcept {
    return !succeeds([&] {
        std::vector<DataType> const variables = dtype_variables(op_, input_types, num_inputs);
        for (int32_t i = 0; i < num_outputs; ++i) {
            TensorRow const& row = op_.outputs[i];
            output_types[i] = row.variable < 0 ? row.literal : variables[static_cast<size_t>(row.variable)];
        }
    });
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs, nvinfer1::DimsExprs const*,
                                int32_t, nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                nvinfer1::IExprBuilder&) noexcept {
    return !succeeds([&] {
        for (int32_t i = 0; i < num_inputs; ++i) {
            TensorRow const& row = op_.inputs[i];
            if (inputs[i].nbDims != row.axes.count) {
                throw PluginError(std::string(row.name) + " has " + std::to_string(inputs[i].nbDims) +
                                  " axes, expected " + std::to_string(row.axes.count));
            }
        }
        for (int32_t i = 0; i < num_outputs; ++i) {
            outputs[i].nbDims = op_.outputs[i].axes.count;
            for (int j = 0; j < outputs[i].nbDims; ++j) outputs[i].d[j] = size_of(op_, op_.outputs[i], j, inputs);
        }
    });
}

bool Plugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t num_inputs,
                                       int32_t) noexcept {
    auto const row_of = [&](int32_t i) -> TensorRow const& {
        return i < num_inputs ? op_.inputs[i] : op_.outputs[i - num_inputs];
    };
    TensorRow const& row = row_of(position);
    PluginTensorDesc const& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (row.variable < 0) return tensor.type == row.literal;
    for (int32_t i = 0; i < position; ++i) {
        if (row_of(i).variable == row.variable) return tensor.type == tensors[i].desc.type;
    }
    List<DataType> const& allowed = op_.dtypes[row.variable].allowed;
    return std::find(allowed.begin(), allowed.end(), tensor.type) != allowed.end();
}

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t num_inputs, DynamicPluginTensorDesc const*,
                                int32_t) noexcept {
    return !succeeds([&] {
        for (Dims DynamicPluginTensorDesc::* bound :
             {&DynamicPluginTensorDesc::min, &DynamicPluginTensorDesc::opt, &DynamicPluginTensorDesc::max}) {
            Plan(problem(tensors(in, num_inputs, [&](auto const& d) { return Tensor{d.*bound, d.desc.type}; })), 0);
        }
    });
}

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t num_inputs, DynamicPluginTensorDesc const*,
                                int32_t) const noexcept {
    size_t bytes = 0;
    succeeds([&] {
        auto const largest = tensors(in, num_inputs, [](auto const& d) { return Tensor{d.max, d.desc.type}; });
        bytes = Plan(problem(largest), 0).workspace_bytes;
    });
    return bytes;
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
    return output >= 0 && output < op_.outputs.count ? op_.outputs[output].replaces : -1;
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* in, int32_t num_inputs, PluginTensorDesc const*,
                              int32_t) noexcept {
    return !succeeds([&] { Plan(problem(tensors(in, num_inputs)), 0); });
}

bool Plugin::list_launches(PluginTensorDesc const* in, int sm, std::string& text) const noexcept {
    return succeeds([&] { text = json(Plan(problem(tensors(in, op_.inputs.count)), sm).launches); });
}

void Plugin::prepare(PluginTensorDesc const* in) {
    bool is_known = !planned_for_.empty();
    for (size_t i = 0; is_known && i < planned_for_.size(); ++i) is_known = same(planned_for_[i].dims, in[i].dims);
    if (is_known) return;
    planned_for_.clear();
    std::vector<Tensor> inputs = tensors(in, op_.inputs.count);
    Device const device = current_device();
    Problem const shapes = problem(inputs);
    Plan plan(shapes, device.sm);
    load(plan.launches, device);
    launches_ = std::move(plan.launches);
    workspace_bytes_ = plan.workspace_bytes;
    planned_for_ = std::move(inputs);
}

int32_t Plugin::enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return !succeeds([&] {
        for (int i = 0; i < op_.outputs.count; ++i) {
            int const replaces = op_.outputs[i].replaces;
            if (replaces >= 0 && inputs[replaces] != outputs[i]) {
                throw PluginError(std::string(op_.outputs[i].name) + " does not have the address of " +
                                  op_.inputs[replaces].name +
                                  ": build the engine with PreviewFeature ALIASED_PLUGIN_IO_10_03 and bind both to the"
                                  " same memory");
            }
        }
        prepare(in);
        if (workspace_bytes_ && !workspace) throw PluginError("the workspace is null");
        run(launches_, inputs, outputs, workspace, stream);
    });
}

}  // namespace nemo
