#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <exception>

namespace nemo {

namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
thread_local std::string* captured = nullptr;

// TensorRT 10's logger interfaces have different function tables, so that a call would crash. The version is asked of
// the library that contains the finder's functions. TensorRT-RTX versions start at 1.
bool has_our_function_table(nvinfer1::ILoggerFinder const* finder) {
    Dl_info info{};
    void const* function_table = *reinterpret_cast<void const* const*>(finder);
    if (!dladdr(function_table, &info) || !info.dli_fname) return true;
    void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return true;
    auto const major = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibMajorVersion"));
    bool const is_ours = !major || major() == 1 || major() >= 11;
    dlclose(library);
    return is_ours;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept {
    logger_finder = finder && has_our_function_table(finder) ? finder : nullptr;
}

LogCapture::LogCapture(std::string& text) noexcept { captured = &text; }
LogCapture::~LogCapture() { captured = nullptr; }

void log(Severity severity, std::string const& message) noexcept {
    try {
        if (captured) {
            if (severity <= Severity::kERROR) *captured += message + "\n";
            return;
        }
        nvinfer1::ILoggerFinder* const finder = logger_finder;
        if (nvinfer1::ILogger* const logger = finder ? finder->findLogger() : nullptr) {
            logger->log(severity, message.c_str());
            return;
        }
    } catch (std::exception const&) {
        // There is no logger, or no memory for the text.
    }
    std::fprintf(stderr, "libnemo_plugins: %s\n", message.c_str());
}

void log_error(char const* op, std::string const& layer, char const* message) noexcept {
    try {
        log(Severity::kERROR, std::string(op) + (layer.empty() ? "" : " ") + layer + ": " + message);
    } catch (std::exception const&) {
        log(Severity::kERROR, {});  // no memory for the text
    }
}

}  // namespace nemo
