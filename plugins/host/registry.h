// The entry points through which TensorRT finds the plugin creators of all ops.
#pragma once

#include "tensorrt.h"

#define NEMO_EXPORT __attribute__((visibility("default")))

extern "C" {
NEMO_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
NEMO_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
NEMO_EXPORT char const* nemo_plugin_describe();  // JSON: version, build hash, SMs
}
