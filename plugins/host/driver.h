// The few CUDA driver functions that a launch needs. libcuda.so.1 is opened on first use, so that a machine without a
// GPU can load this library, infer shapes and build engines.
#pragma once

#include "tables.h"

namespace nemo {

// A kernel loaded on a device (CUfunction or CUkernel), valid in every context of that device.
using Function = struct CUkern_st*;

struct Device {
    int ordinal;
    int sm;  // 90 for compute capability 9.0
};

// Use this library as the CUDA driver; must be called before the driver is first used. For tests.
void set_driver_library(char const* path);

// Returns the calling thread's current device. Throws PluginError without a driver or a context.
Device current_device();

// Returns the kernel, loaded on the device once per process. Throws PluginError with the driver's error name.
Function load(KernelRow const& kernel, Device device);

// Throws PluginError with the driver's error name.
void launch(Function function, KernelRow const& kernel, unsigned const (&grid)[3], void** parameters,
            cudaStream_t stream);

}  // namespace nemo
