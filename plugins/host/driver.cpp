#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>

#include "problem.h"

namespace nemo {

namespace {

// Declarations from the driver API's documentation; CUresult, CUdevice and enumerations are ints.
struct Driver {
    int (*cuCtxGetDevice)(int* device);
    int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
    int (*cuGetErrorName)(int error, char const** name);
    int (*cuKernelGetFunction)(void** function, Function kernel);
    int (*cuKernelSetAttribute)(int attribute, int value, Function kernel, int device);
    int (*cuLaunchKernel)(Function kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, cudaStream_t stream,
                          void** parameters, void** extra);
    int (*cuLibraryGetKernel)(Function* kernel, void* library, char const* name);
    int (*cuLibraryLoadData)(void** library, void const* code, void* jit_options, void* jit_values,
                             unsigned num_jit_options, void* options, void* values, unsigned num_options);
};

constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxDynamicSharedBytes = 8;
constexpr unsigned kSharedBytesWithoutAsking = 48 * 1024;

template <class F>
void find(void* library, char const* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw PluginError(std::string("the NVIDIA driver has no ") + name + ": install driver 525 or later");
}

std::string& driver_library() {
    static std::string path = "libcuda.so.1";
    return path;
}

Driver open_driver() {
    void* const library = dlopen(driver_library().c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        throw PluginError("kernels cannot run on this machine without the NVIDIA driver's " + driver_library());
    }
    Driver driver{};
    find(library, "cuCtxGetDevice", driver.cuCtxGetDevice);
    find(library, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute);
    find(library, "cuGetErrorName", driver.cuGetErrorName);
    find(library, "cuKernelGetFunction", driver.cuKernelGetFunction);
    find(library, "cuKernelSetAttribute", driver.cuKernelSetAttribute);
    find(library, "cuLaunchKernel", driver.cuLaunchKernel);
    find(library, "cuLibraryGetKernel", driver.cuLibraryGetKernel);
    find(library, "cuLibraryLoadData", driver.cuLibraryLoadData);
    return driver;
}

Driver const& driver() {
    static Driver const found = open_driver();  // if it throws, the next call tries again
    return found;
}

void check(int error, char const* call, KernelRow const* kernel = nullptr) {
    if (!error) return;
    char const* name = nullptr;
    driver().cuGetErrorName(error, &name);
    std::string text = std::string(call) + " returned " + (name ? name : std::to_string(error).c_str());
    throw PluginError(kernel ? text + " for " + kernel->variant : text);
}

Function load_now(KernelRow const& kernel, int device) {
    Driver const& cuda = driver();
    void* library = nullptr;
    check(cuda.cuLibraryLoadData(&library, kernel.cubin, nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData",
          &kernel);
    Function function = nullptr;
    check(cuda.cuLibraryGetKernel(&function, library, kernel.entry), "cuLibraryGetKernel", &kernel);
    if (kernel.shared_bytes > kSharedBytesWithoutAsking) {
        check(
            cuda.cuKernelSetAttribute(kMaxDynamicSharedBytes, static_cast<int>(kernel.shared_bytes), function, device),
            "cuKernelSetAttribute", &kernel);
    }
    // Load eagerly: a lazy load in the first launch would fail during stream capture.
    void* loaded = nullptr;
    check(cuda.cuKernelGetFunction(&loaded, function), "cuKernelGetFunction", &kernel);
    return function;
}

}  // namespace

void set_driver_library(char const* path) { driver_library() = path; }

Device current_device() {
    Driver const& cuda = driver();
    Device device{};
    int major = 0;
    int minor = 0;
    check(cuda.cuCtxGetDevice(&device.ordinal), "cuCtxGetDevice");
    check(cuda.cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device.ordinal), "cuDeviceGetAttribute");
    check(cuda.cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device.ordinal), "cuDeviceGetAttribute");
    device.sm = 10 * major + minor;
    return device;
}

Function load(KernelRow const& kernel, Device device) {
    static std::mutex mutex;
    static std::map<std::pair<unsigned char const*, int>, Function> loaded;
    std::lock_guard<std::mutex> const lock(mutex);
    Function& function = loaded[{kernel.cubin, device.ordinal}];
    if (!function) function = load_now(kernel, device.ordinal);
    return function;
}

void launch(Function function, KernelRow const& kernel, unsigned const (&grid)[3], void** parameters,
            cudaStream_t stream) {
    check(driver().cuLaunchKernel(function, grid[0], grid[1], grid[2], kernel.threads, 1, 1, kernel.shared_bytes,
                                  stream, parameters, nullptr),
          "cuLaunchKernel", &kernel);
}

}  // namespace nemo
