// Messages to TensorRT's logger, or to stderr where TensorRT gave none.
#pragma once

#include <string>

#include "tensorrt.h"

namespace nemo {

using Severity = nvinfer1::ILogger::Severity;

void log(Severity severity, std::string const& message) noexcept;

// An error of one node: the op, its layer where it has a name, and what is wrong.
void log_error(char const* op, std::string const& layer, char const* message) noexcept;

// Gives the logger of the thread that asks, from here on.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// While it lives, this thread's errors are added to a text instead, a line each.
class LogCapture {
public:
    explicit LogCapture(std::string& text) noexcept;
    ~LogCapture();
    LogCapture(LogCapture const&) = delete;
    LogCapture& operator=(LogCapture const&) = delete;
};

}  // namespace nemo
