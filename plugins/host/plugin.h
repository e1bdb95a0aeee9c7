// The plugin of one node in a TensorRT network; implements TensorRT's plugin interfaces from the op's table row.
#pragma once

#include <string>
#include <vector>

#include "plan.h"
#include "problem.h"

namespace nemo {

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    Plugin(OpRow const& op, std::string layer, std::vector<Attribute> attributes);
    Plugin(Plugin const& other) : Plugin(other.op_, other.layer_, other.attributes_) {}
    Plugin& operator=(Plugin const&) = delete;

    // Writes the launches for these inputs on an SM as JSON. Returns false on an error, which is logged.
    bool list_launches(nvinfer1::PluginTensorDesc const* in, int sm, std::string& text) const noexcept;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return op_.name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    // Called while an engine is built.
    int32_t getNbOutputs() const noexcept override { return op_.outputs.count; }
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                               nvinfer1::DataType const* input_types, int32_t num_inputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                            nvinfer1::IExprBuilder&) noexcept override;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                   int32_t num_inputs, int32_t num_outputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t num_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t num_outputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t num_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t num_outputs) const noexcept override;
    int32_t getAliasedInput(int32_t output) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields_; }

    // Called while an engine runs.
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t num_inputs,
                          nvinfer1::PluginTensorDesc const* out, int32_t num_outputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

private:
    // Runs the body and logs what it throws. Returns true if it threw nothing.
    template <class Body>
    bool succeeds(Body const& body) const noexcept;
    Problem problem(std::vector<Tensor> const& inputs) const { return {op_, attributes_, inputs}; }

    // Plans and loads kernels when the shapes are new, so enqueue once with the same shapes before a stream capture.
    void prepare(nvinfer1::PluginTensorDesc const* in);

    OpRow const& op_;
    std::string const layer_;
    std::vector<Attribute> const attributes_;
    std::vector<nvinfer1::PluginField> serialized_;
    nvinfer1::PluginFieldCollection fields_;

    // The plan for the latest shapes. A plugin belongs to one execution context, used by one thread at a time.
    std::vector<Tensor> planned_for_;
    std::vector<Launch> launches_;
    size_t workspace_bytes_ = 0;
};

}  // namespace nemo
