// A CUDA driver for tests: a kernel's code is its variant's name, and a launch calls the test back.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

struct Launched {
    char const* variant;
    char const* entry;
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    unsigned allowed_shared_bytes;
    void* stream;
    void** parameters;
};

struct Kernel {
    std::string variant;
    std::string entry;
    unsigned allowed_shared_bytes;
    bool is_loaded;
};

namespace {

int sm = 90;
std::string failing;
std::map<std::string, int> calls;
void (*on_launch)(Launched const*) = nullptr;

constexpr int kOutOfMemory = 2;

int result(char const* call) {
    ++calls[call];
    return failing == call ? kOutOfMemory : 0;
}

}  // namespace

extern "C" {

void fake_reset(int sm_, void (*on_launch_)(Launched const*)) {
    sm = sm_;
    on_launch = on_launch_;
    failing.clear();
    calls.clear();
}

void fake_fail(char const* call) { failing = call; }

int fake_calls(char const* call) { return calls[call]; }

int cuCtxGetDevice(int* device) {
    *device = 3;
    return result("cuCtxGetDevice");
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device != 3) return 101;
    *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : -1;
    return result("cuDeviceGetAttribute");
}

int cuGetErrorName(int error, char const** name) {
    *name = error == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
    return 0;
}

int cuLibraryLoadData(void** library, void const* code, void*, void*, unsigned, void*, void*, unsigned) {
    *library = const_cast<void*>(code);
    return result("cuLibraryLoadData");
}

int cuLibraryGetKernel(Kernel** kernel, void* library, char const* entry) {
    *kernel = new Kernel{static_cast<char const*>(library), entry, 48 * 1024, false};
    return result("cuLibraryGetKernel");
}

int cuKernelSetAttribute(int attribute, int value, Kernel* kernel, int device) {
    if (attribute != 8 || device != 3) return 1;
    kernel->allowed_shared_bytes = static_cast<unsigned>(value);
    return result("cuKernelSetAttribute");
}

int cuKernelGetFunction(void** function, Kernel* kernel) {
    *function = kernel;
    kernel->is_loaded = true;
    return result("cuKernelGetFunction");
}

int cuLaunchKernel(Kernel* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                   void** extra) {
    if (extra || !kernel->is_loaded || shared_bytes > kernel->allowed_shared_bytes) return 1;
    Launched const launched{kernel->variant.c_str(),
                            kernel->entry.c_str(),
                            {grid_x, grid_y, grid_z},
                            {block_x, block_y, block_z},
                            shared_bytes,
                            kernel->allowed_shared_bytes,
                            stream,
                            parameters};
    if (on_launch) on_launch(&launched);
    return result("cuLaunchKernel");
}

}  // extern "C"
