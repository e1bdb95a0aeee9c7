// The test entry, called by `plugins/library.py`: runs one op through its plugin class without TensorRT.
//
// A plugin goes through the same steps as in TensorRT: it is created from fields, asked for dtypes, formats, shapes and
// workspace, serialized, created again from the serialized fields, attached to a context, and enqueued.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "log.h"
#include "plugin.h"
#include "registry.h"

using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

extern "C" {

struct nemo_test_tensor {
    int32_t dtype;  // nvinfer1::DataType
    int32_t rank;
    int64_t shape[Dims::MAX_DIMS];
};

}  // extern "C"

namespace {

thread_local std::string errors;

// The messages of one call.
struct Call {
    nemo::LogCapture capture{(errors.clear(), errors)};
};

nvinfer1::IPluginCreatorV3One* creator_of(char const* op) {
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
        if (!std::strcmp(creator->getPluginName(), op)) return creator;
    }
    nemo::log(nemo::Severity::kERROR, std::string("there is no op ") + op);
    return nullptr;
}

template <class Capability>
Capability* capability(IPluginV3& plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

PluginTensorDesc described(nemo_test_tensor const& tensor) {
    PluginTensorDesc desc{};
    desc.type = static_cast<nvinfer1::DataType>(tensor.dtype);
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    desc.dims.nbDims = tensor.rank;
    std::copy_n(tensor.shape, Dims::MAX_DIMS, desc.dims.d);
    return desc;
}

std::vector<DynamicPluginTensorDesc> as_profile(std::vector<PluginTensorDesc> const& descs) {
    std::vector<DynamicPluginTensorDesc> found;
    for (PluginTensorDesc const& desc : descs) found.push_back({desc, desc.dims, desc.dims, desc.dims});
    return found;
}

class TestPlugin {
public:
    explicit TestPlugin(IPluginV3* build) : build_(build) {}

    // Builds with these inputs. Returns false if the plugin failed, which it logged.
    bool build(std::vector<PluginTensorDesc> inputs) {
        auto* const step = capability<nvinfer1::IPluginV3OneBuildV2>(*build_, PluginCapabilityType::kBUILD);
        auto const num_inputs = static_cast<int32_t>(inputs.size());
        auto const num_outputs = step->getNbOutputs();
        in = std::move(inputs);
        out.assign(static_cast<size_t>(num_outputs), PluginTensorDesc{});
        if (!infer_types(*step, num_inputs, num_outputs)) return false;
        if (!infer_shapes(*step, num_inputs, num_outputs)) return false;

        std::vector<PluginTensorDesc> all = in;
        all.insert(all.end(), out.begin(), out.end());
        std::vector<DynamicPluginTensorDesc> const profile = as_profile(all);
        for (int32_t i = 0; i < num_inputs + num_outputs; ++i) {
            if (step->supportsFormatCombination(i, profile.data(), num_inputs, num_outputs)) continue;
            nemo::log(nemo::Severity::kERROR, "the plugin does not support the format of tensor " + std::to_string(i));
            return false;
        }
        DynamicPluginTensorDesc const* const outputs = profile.data() + num_inputs;
        if (step->configurePlugin(profile.data(), num_inputs, outputs, num_outputs)) return false;
        workspace_bytes = step->getWorkspaceSize(profile.data(), num_inputs, outputs, num_outputs);
        aliases.clear();
        for (int32_t i = 0; i < num_outputs; ++i) aliases.push_back(step->getAliasedInput(i));
        return change_shapes();
    }

    int32_t enqueue(void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) {
        if (!context_) {
            nemo::log(nemo::Severity::kERROR, "the shapes must be set before enqueue");
            return 1;
        }
        auto* const step = capability<nvinfer1::IPluginV3OneRuntime>(*context_, PluginCapabilityType::kRUNTIME);
        return step->enqueue(in.data(), out.data(), inputs, outputs, workspace, stream);
    }

    // Returns the launches of an enqueue on an SM as JSON, or null on an error, which is logged.
    char const* launches(int32_t sm) {
        return static_cast<nemo::Plugin&>(*build_).list_launches(in.data(), sm, text_) ? text_.c_str() : nullptr;
    }

    std::vector<PluginTensorDesc> in;
    std::vector<PluginTensorDesc> out;
    std::vector<int32_t> aliases;
    size_t workspace_bytes = 0;

private:
    bool infer_types(nvinfer1::IPluginV3OneBuildV2& step, int32_t num_inputs, int32_t num_outputs) {
        std::vector<nvinfer1::DataType> types;
        for (PluginTensorDesc const& desc : in) types.push_back(desc.type);
        std::vector<nvinfer1::DataType> found(static_cast<size_t>(num_outputs));
        if (step.getOutputDataTypes(found.data(), num_outputs, types.data(), num_inputs)) return false;
        for (size_t i = 0; i < out.size(); ++i) {
            out[i].type = found[i];
            out[i].format = nvinfer1::TensorFormat::kLINEAR;
        }
        return true;
    }

    // A symbolic size is an address that the plugin returns without reading, which identifies the size.
    bool infer_shapes(nvinfer1::IPluginV3OneBuildV2& step, int32_t num_inputs, int32_t num_outputs) {
        std::vector<std::array<char, Dims::MAX_DIMS>> symbols(in.size());
        std::vector<nvinfer1::DimsExprs> inputs(in.size());
        std::vector<nvinfer1::DimsExprs> outputs(out.size());
        auto const symbol = [&](size_t i, int32_t j) {
            return reinterpret_cast<nvinfer1::IDimensionExpr const*>(&symbols[i][static_cast<size_t>(j)]);
        };
        for (size_t i = 0; i < in.size(); ++i) {
            inputs[i].nbDims = in[i].dims.nbDims;
            for (int32_t j = 0; j < inputs[i].nbDims; ++j) inputs[i].d[j] = symbol(i, j);
        }
        alignas(16) char unread_builder[64]{};
        auto& builder = reinterpret_cast<nvinfer1::IExprBuilder&>(unread_builder);
        if (step.getOutputShapes(inputs.data(), num_inputs, nullptr, 0, outputs.data(), num_outputs, builder)) {
            return false;
        }
        for (size_t k = 0; k < out.size(); ++k) {
            out[k].dims.nbDims = outputs[k].nbDims;
            for (int32_t axis = 0; axis < outputs[k].nbDims; ++axis) {
                for (size_t i = 0; i < in.size(); ++i) {
                    for (int32_t j = 0; j < in[i].dims.nbDims; ++j) {
                        if (symbol(i, j) == outputs[k].d[axis]) out[k].dims.d[axis] = in[i].dims.d[j];
                    }
                }
            }
        }
        return true;
    }

    // The plugin of the engine, and its clone in an execution context, which stays the same for new shapes.
    bool deserialize() {
        auto* const core = capability<nvinfer1::IPluginV3OneCore>(*build_, PluginCapabilityType::kCORE);
        auto* const step = capability<nvinfer1::IPluginV3OneRuntime>(*build_, PluginCapabilityType::kRUNTIME);
        PluginFieldCollection const* const fields = step->getFieldsToSerialize();
        engine_.reset(creator_of(core->getPluginName())->createPlugin("test", fields, TensorRTPhase::kRUNTIME));
        if (!engine_) return false;
        auto* const runtime = capability<nvinfer1::IPluginV3OneRuntime>(*engine_, PluginCapabilityType::kRUNTIME);
        context_.reset(runtime->attachToContext(nullptr));
        return context_ != nullptr;
    }

    bool change_shapes() {
        if (!context_ && !deserialize()) return false;
        auto* const step = capability<nvinfer1::IPluginV3OneRuntime>(*context_, PluginCapabilityType::kRUNTIME);
        return !step->onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                    static_cast<int32_t>(out.size()));
    }

    std::unique_ptr<IPluginV3> build_;
    std::unique_ptr<IPluginV3> engine_;
    std::unique_ptr<IPluginV3> context_;
    std::string text_;
};

}  // namespace

extern "C" {

// Returns the errors of the calling thread's last call, one per line; valid until its next call.
NEMO_EXPORT char const* nemo_plugin_test_errors() { return errors.c_str(); }

// Uses this library as the CUDA driver; must be called before the first enqueue.
NEMO_EXPORT void nemo_plugin_test_driver(char const* path) { nemo::set_driver_library(path); }

// Creates a plugin of the op from fields; returns null on an error, which is logged.
NEMO_EXPORT void* nemo_plugin_test_create(char const* op, char const* layer, nvinfer1::PluginField const* fields,
                                          int32_t count) {
    Call const call;
    nvinfer1::IPluginCreatorV3One* const creator = creator_of(op);
    if (!creator) return nullptr;
    PluginFieldCollection const given{count, fields};
    IPluginV3* const plugin = creator->createPlugin(layer, &given, TensorRTPhase::kBUILD);
    return plugin ? new TestPlugin(plugin) : nullptr;
}

NEMO_EXPORT void nemo_plugin_test_destroy(void* plugin) { delete static_cast<TestPlugin*>(plugin); }

// Sets the inputs' shapes. Writes each output, the input it aliases or −1, and the workspace size; returns 0 on
// success.
NEMO_EXPORT int32_t nemo_plugin_test_shape(void* plugin, nemo_test_tensor const* inputs, int32_t num_inputs,
                                           nemo_test_tensor* outputs, int32_t* aliases, uint64_t* workspace_bytes) {
    Call const call;
    auto& test = *static_cast<TestPlugin*>(plugin);
    std::vector<PluginTensorDesc> descs;
    for (int32_t i = 0; i < num_inputs; ++i) descs.push_back(described(inputs[i]));
    if (!test.build(std::move(descs))) return 1;
    for (size_t i = 0; i < test.out.size(); ++i) {
        outputs[i].dtype = static_cast<int32_t>(test.out[i].type);
        outputs[i].rank = test.out[i].dims.nbDims;
        std::copy_n(test.out[i].dims.d, Dims::MAX_DIMS, outputs[i].shape);
        aliases[i] = test.aliases[i];
    }
    *workspace_bytes = test.workspace_bytes;
    return 0;
}

// Enqueues in the calling thread's CUDA context; returns 0 on success.
NEMO_EXPORT int32_t nemo_plugin_test_enqueue(void* plugin, void const* const* inputs, void* const* outputs,
                                             void* workspace, void* stream) {
    Call const call;
    return static_cast<TestPlugin*>(plugin)->enqueue(inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
}

// Returns the launches of an enqueue on an SM as JSON, or null on an error; valid until the next call.
NEMO_EXPORT char const* nemo_plugin_test_launches(void* plugin, int32_t sm) {
    Call const call;
    return static_cast<TestPlugin*>(plugin)->launches(sm);
}

}  // extern "C"
