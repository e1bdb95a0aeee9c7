// TensorRT's plugin interfaces: NVIDIA's headers where the build found them, else our declaration of them.
#pragma once

#ifdef NEMO_NVIDIA_HEADERS
#include <NvInferRuntime.h>
#else
#include "tensorrt_abi.h"
#endif

#include <type_traits>

static_assert(std::is_base_of_v<nvinfer1::IVersionedInterface, nvinfer1::ILogger>,
              "these headers are of TensorRT 10 or older: TensorRT 11 or TensorRT-RTX 1.x is needed");
