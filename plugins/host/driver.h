// The few functions of CUDA's driver that a launch needs, found in libcuda.so.1 when first used: a machine
// without a GPU loads this library, infers shapes and builds engines.
#pragma once

#include "tables.h"

namespace nemo {

// A kernel on a device, as the driver names it; valid in every context of that device.
using Function = struct CUkern_st*;

struct Device {
    int ordinal;
    int sm;  // 90 for compute capability 9.0
};

// For tests: the library to take for CUDA's driver, before the first call that needs it.
void set_driver_library(char const* path);

// The calling thread's current device. Throws Refused without a driver or a context.
Device current_device();

// The kernel loaded on the device, once a process. Throws Refused with the driver's own error name.
Function load(KernelRow const& kernel, Device device);

// Throws Refused with the driver's own error name.
void launch(Function function, KernelRow const& kernel, unsigned const (&grid)[3], void** parameters,
            cudaStream_t stream);

}  // namespace nemo
