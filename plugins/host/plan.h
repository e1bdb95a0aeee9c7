// The launches of one call of an op: which compiled kernels, on which grids, with which arguments.
//
// An op's plugin.cpp names the kernels, grids and buffers. Everything else follows from names: a kernel parameter is
// bound to the input, output, buffer, axis, attribute or integer of the same name. Among a kernel's compiled variants,
// the one whose pointer types match the dtypes of the bound tensors is chosen, and block sizes are read from it.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "problem.h"

namespace nemo {

using Renames =
    std::vector<std::pair<char const*, char const*>>;  // pairs: a parameter, and the name that it is bound to

// A compile-time constant that a kernel's variant must have.
struct Wanted {
    Wanted(char const* name_, int64_t value_) : name(name_), value(std::to_string(value_)) {}
    Wanted(char const* name_, char const* value_) : name(name_), value(value_) {}

    char const* name;
    std::string value;
};
using Constants = std::vector<Wanted>;

// A kernel's compiled variant, with its parameters' bindings.
struct Choice {
    KernelRow const* row;
    Renames renames;

    int64_t operator[](char const* constant) const;  // a compile-time constant, such as a block size
};

struct Argument {
    enum class Kind { kInput, kOutput, kWorkspace, kValue } kind;
    size_t index;   // the index of the input or output, or the offset in the workspace
    uint64_t bits;  // the bits of a value argument
    char const* name;
    bool aligned;
};

struct Launch {
    KernelRow const* row;
    unsigned grid[3];
    std::vector<Argument> arguments;
    Function function;  // null until loaded
};

class Plan {
public:
    // Lays out the op's workspace and, unless `sm` is 0, lists the launches on that SM. Throws PluginError.
    Plan(Problem const& problem, int sm);

    // The following functions are for an op's plugin.cpp.
    void buffer(char const* name, nvinfer1::DataType type, int64_t count);
    void integer(char const* name, int64_t value);  // an argument other than axes and attributes
    // The one variant, or all variants, of a kernel with these constants and the current dtypes.
    Choice kernel(char const* name, Constants const& constants, Renames const& renames = {}) const;
    std::vector<Choice> kernels(char const* name, Constants const& constants, Renames const& renames = {}) const;
    void launch(Choice const& choice, int64_t grid_x, int64_t grid_y = 1, int64_t grid_z = 1);

    std::vector<Launch> launches;
    size_t workspace_bytes = 0;

private:
    struct Pointer {
        Argument::Kind kind;
        size_t index;
        nvinfer1::DataType type;
    };
    struct Buffer {
        char const* name;
        Pointer pointer;
    };

    std::string form(char const* name, Constants const& constants) const;
    bool fits(KernelRow const& row, Constants const& constants, Renames const& renames) const;
    std::optional<Pointer> pointer(char const* name) const;
    Argument bind(Parameter const& parameter, char const* name) const;
    Argument value(Parameter const& parameter, char const* name) const;

    Problem const& problem_;
    SmRow const* sm_ = nullptr;
    std::vector<Buffer> buffers_;
    std::vector<std::pair<char const*, int64_t>> integers_;
};

void load(std::vector<Launch>& launches, Device device);

// Enqueues the launches on the stream, without allocating or waiting. Throws PluginError.
void run(std::vector<Launch> const& launches, void const* const* inputs, void* const* outputs, void* workspace,
         cudaStream_t stream);

// Returns the launches as JSON, for tests: [{"variant", "grid", "arguments": [[name, value or null], …]}, …].
std::string json(std::vector<Launch> const& launches);

}  // namespace nemo
