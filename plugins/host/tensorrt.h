// TensorRT's plugin interfaces: NVIDIA's headers if the build found them, else our declarations.
#pragma once

#ifdef NEMO_NVIDIA_HEADERS
#include <NvInferRuntime.h>
#else
#include "tensorrt_abi.h"
#endif

#include <type_traits>

static_assert(std::is_base_of_v<nvinfer1::IVersionedInterface, nvinfer1::ILogger>,
              "these are headers of TensorRT 10 or older: TensorRT 11 or TensorRT-RTX 1.x is required");
