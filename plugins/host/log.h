// Messages go to TensorRT's logger, or to stderr if TensorRT provided none.
#pragma once

#include <string>

#include "tensorrt.h"

namespace nemo {

using Severity = nvinfer1::ILogger::Severity;

void log(Severity severity, std::string const& message) noexcept;

// Logs an error of one node: the op, the layer's name if it has one, and the message.
void log_error(char const* op, std::string const& layer, char const* message) noexcept;

// Sets where the logger of the calling thread is found.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// While this object exists, the thread's errors are appended to a text instead, one per line.
class LogCapture {
public:
    explicit LogCapture(std::string& text) noexcept;
    ~LogCapture();
    LogCapture(LogCapture const&) = delete;
    LogCapture& operator=(LogCapture const&) = delete;
};

}  // namespace nemo
