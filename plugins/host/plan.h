// What one call of an op launches: which compiled kernels, on which grids, with which arguments.
//
// An op's plugin.cpp names kernels, grids and buffers. Everything else follows from names: a kernel's parameter is the
// input, output, buffer, axis, attribute or integer of that name, and of a kernel's compiled forms the one is taken
// whose pointers have the dtypes of what they point to. Block sizes are read from the compiled form, not repeated here.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "problem.h"

namespace nemo {

using Renames = std::vector<std::pair<char const*, char const*>>;  // a parameter → the name of what it gets

// A compile-time constant that a kernel's form must have.
struct Wanted {
    Wanted(char const* name_, int64_t value_) : name(name_), value(std::to_string(value_)) {}
    Wanted(char const* name_, char const* value_) : name(name_), value(value_) {}

    char const* name;
    std::string value;
};
using Constants = std::vector<Wanted>;

// A kernel's compiled form, with what its parameters stand for.
struct Choice {
    KernelRow const* row;
    Renames renames;

    int64_t operator[](char const* constant) const;  // a compile-time constant, such as a block size
};

struct Argument {
    enum class Kind { kInput, kOutput, kWorkspace, kValue } kind;
    size_t index;   // which input or output, or the offset in the workspace
    uint64_t bits;  // a value as the kernel takes it
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
    // Lays the op's workspace out and, unless `sm` is 0, lists its launches on that SM. Throws Refused.
    Plan(Problem const& problem, int sm);

    // For an op's plugin.cpp: what follows is all that it says.
    void buffer(char const* name, nvinfer1::DataType type, int64_t count);
    void integer(char const* name, int64_t value);  // that launches take beside axes and attributes
    // The kernel's one form, or all forms, with these constants and the dtypes at hand.
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

// Enqueues the launches on the stream: allocates nothing, waits for nothing. Throws Refused.
void run(std::vector<Launch> const& launches, void const* const* inputs, void* const* outputs, void* workspace,
         cudaStream_t stream);

// The launches as JSON, for tests: [{"variant", "grid", "arguments": [[name, value or null], …]}, …].
std::string json(std::vector<Launch> const& launches);

}  // namespace nemo
