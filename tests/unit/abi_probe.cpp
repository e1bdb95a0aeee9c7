// Prints what must agree between TensorRT's headers and our declaration: sizes, offsets, function table slots, numbers.
#include <cstddef>
#include <cstdio>
#include <cstring>

#ifdef NEMO_NVIDIA_HEADERS
#include <NvInferRuntime.h>
#else
#include "host/tensorrt_abi.h"
#endif

using namespace nvinfer1;

namespace {

// A pointer to a virtual member function holds its offset in the function table (Itanium C++ ABI, section 2.3);
// 64-bit Arm marks it as virtual in the second word, others in the lowest bit.
template <class Function>
long slot(Function function) {
    std::ptrdiff_t words[2];
    static_assert(sizeof function == sizeof words);
    std::memcpy(words, &function, sizeof words);
#ifdef __aarch64__
    return words[0] / static_cast<long>(sizeof(void*));
#else
    return (words[0] - 1) / static_cast<long>(sizeof(void*));
#endif
}

template <class Interface>
void print_kind(char const* name) {
    alignas(16) static char unread[64];
    InterfaceInfo const info = reinterpret_cast<Interface const*>(unread)->Interface::getInterfaceInfo();
    std::printf("kind %s %s %d.%d\n", name, info.kind, info.major, info.minor);
}

}  // namespace

#define SLOT(interface, function) \
    std::printf("slot " #interface "." #function " %ld\n", slot(&interface::function))
#define SIZE(type) std::printf("size " #type " %zu align %zu\n", sizeof(type), alignof(type))
#define OFFSET(type, member) std::printf("offset " #type "." #member " %zu\n", offsetof(type, member))
#define NUMBER(value) std::printf("number " #value " %d\n", static_cast<int>(value))
#define KIND(interface) print_kind<interface>(#interface)

int main() {
    SIZE(Dims);
    OFFSET(Dims, nbDims);
    OFFSET(Dims, d);
    SIZE(PluginTensorDesc);
    OFFSET(PluginTensorDesc, dims);
    OFFSET(PluginTensorDesc, type);
    OFFSET(PluginTensorDesc, format);
    OFFSET(PluginTensorDesc, scale);
    SIZE(DynamicPluginTensorDesc);
    OFFSET(DynamicPluginTensorDesc, desc);
    OFFSET(DynamicPluginTensorDesc, min);
    OFFSET(DynamicPluginTensorDesc, max);
    OFFSET(DynamicPluginTensorDesc, opt);
    SIZE(DimsExprs);
    OFFSET(DimsExprs, nbDims);
    OFFSET(DimsExprs, d);
    SIZE(PluginField);
    OFFSET(PluginField, name);
    OFFSET(PluginField, data);
    OFFSET(PluginField, type);
    OFFSET(PluginField, length);
    SIZE(PluginFieldCollection);
    OFFSET(PluginFieldCollection, nbFields);
    OFFSET(PluginFieldCollection, fields);
    SIZE(InterfaceInfo);
    OFFSET(InterfaceInfo, kind);
    OFFSET(InterfaceInfo, major);
    OFFSET(InterfaceInfo, minor);

    NUMBER(DataType::kFLOAT);
    NUMBER(DataType::kHALF);
    NUMBER(DataType::kINT8);
    NUMBER(DataType::kINT32);
    NUMBER(DataType::kFP8);
    NUMBER(DataType::kBF16);
    NUMBER(DataType::kINT64);
    NUMBER(TensorFormat::kLINEAR);
    NUMBER(TensorRTPhase::kBUILD);
    NUMBER(TensorRTPhase::kRUNTIME);
    NUMBER(PluginCapabilityType::kCORE);
    NUMBER(PluginCapabilityType::kBUILD);
    NUMBER(PluginCapabilityType::kRUNTIME);
    NUMBER(PluginFieldType::kFLOAT32);
    NUMBER(PluginFieldType::kINT32);
    NUMBER(PluginFieldType::kUNKNOWN);
    NUMBER(APILanguage::kCPP);
    NUMBER(ILogger::Severity::kINTERNAL_ERROR);
    NUMBER(ILogger::Severity::kERROR);
    NUMBER(ILogger::Severity::kWARNING);
    NUMBER(ILogger::Severity::kINFO);
    NUMBER(ILogger::Severity::kVERBOSE);

    SLOT(IVersionedInterface, getAPILanguage);
    SLOT(IVersionedInterface, getInterfaceInfo);
    SLOT(IPluginV3, getCapabilityInterface);
    SLOT(IPluginV3, clone);
    SLOT(IPluginV3OneCore, getPluginName);
    SLOT(IPluginV3OneCore, getPluginVersion);
    SLOT(IPluginV3OneCore, getPluginNamespace);
    SLOT(IPluginV3OneBuildV2, configurePlugin);
    SLOT(IPluginV3OneBuildV2, getOutputDataTypes);
    SLOT(IPluginV3OneBuildV2, getOutputShapes);
    SLOT(IPluginV3OneBuildV2, supportsFormatCombination);
    SLOT(IPluginV3OneBuildV2, getNbOutputs);
    SLOT(IPluginV3OneBuildV2, getWorkspaceSize);
    SLOT(IPluginV3OneBuildV2, getValidTactics);
    SLOT(IPluginV3OneBuildV2, getNbTactics);
    SLOT(IPluginV3OneBuildV2, getTimingCacheID);
    SLOT(IPluginV3OneBuildV2, getFormatCombinationLimit);
    SLOT(IPluginV3OneBuildV2, getMetadataString);
    SLOT(IPluginV3OneBuildV2, getAliasedInput);
    SLOT(IPluginV3OneRuntime, setTactic);
    SLOT(IPluginV3OneRuntime, onShapeChange);
    SLOT(IPluginV3OneRuntime, enqueue);
    SLOT(IPluginV3OneRuntime, attachToContext);
    SLOT(IPluginV3OneRuntime, getFieldsToSerialize);
    SLOT(IPluginCreatorV3One, createPlugin);
    SLOT(IPluginCreatorV3One, getFieldNames);
    SLOT(IPluginCreatorV3One, getPluginName);
    SLOT(IPluginCreatorV3One, getPluginVersion);
    SLOT(IPluginCreatorV3One, getPluginNamespace);
    KIND(IPluginV3);
    KIND(IPluginV3OneCore);
    KIND(IPluginV3OneBuildV2);
    KIND(IPluginV3OneRuntime);
    KIND(IPluginCreatorV3One);

#ifndef NEMO_OLD_LOGGER
    SLOT(ILogger, log);
    SLOT(ILoggerFinder, findLogger);
    KIND(ILogger);
    KIND(ILoggerFinder);
#endif
}
