// The types of the constant tables of op SPECs and compiled kernels, which link_tables.py generates.
#pragma once

#include "tensorrt.h"

namespace nemo {

template <class T>
struct List {
    T const* items;
    int count;

    T const* begin() const { return items; }
    T const* end() const { return items + count; }
    T const& operator[](int index) const { return items[index]; }
};

// The size of an axis: that of a named axis plus an offset ("B+1"), or the offset alone if `name` is null.
struct Axis {
    char const* name;
    int64_t offset;
};

struct TensorRow {
    char const* name;
    List<Axis> axes;
    int variable;                // index of its dtype variable, or −1
    nvinfer1::DataType literal;  // its dtype if it has no variable
    int replaces;                // for outputs, the input that is updated in place, or −1
};

struct DtypeRow {
    char const* name;
    List<nvinfer1::DataType> allowed;
};

struct AttributeRow {
    char const* name;
    bool is_float;
};

struct Parameter {
    char const* name;
    char const* type;  // Triton's name: *fp16, i32, fp32
    bool aligned;      // compiled for multiples of 16
};

struct Constant {
    char const* name;
    char const* value;
};

// One compiled variant of a kernel.
struct KernelRow {
    char const* kernel;
    char const* variant;
    char const* entry;  // its name in the cubin
    List<Parameter> parameters;
    unsigned hidden_pointers;  // null pointers to pass after the parameters
    List<Constant> constants;
    unsigned threads;
    unsigned shared_bytes;
    unsigned char const* cubin;
};

struct SmRow {
    int sm;
    List<KernelRow> kernels;
};

class Problem;
class Plan;

// The functions that an op's plugin.cpp provides. They see only shapes, dtypes and attributes, and throw PluginError.
struct OpCode {
    void (*check)(Problem const&);            // throws if no kernel supports the call
    void (*scratch)(Problem const&, Plan&);   // declares the buffers of the workspace
    void (*launches)(Problem const&, Plan&);  // lists the kernels to launch, in order
};

// Defined in each op folder's plugin.cpp, and named after the folder.
extern OpCode const kCausalConv1d;
extern OpCode const kSelectiveScan;
extern OpCode const kPagedAttention;
extern OpCode const kMoeDispatch;

struct OpRow {
    char const* name;
    List<TensorRow> inputs;
    List<TensorRow> outputs;
    List<AttributeRow> attributes;
    List<DtypeRow> dtypes;
    List<SmRow> sms;
    OpCode const* code;
};

extern List<OpRow> const kOps;
extern char const* const kNamespace;
extern char const* const kVersion;
extern char const* const kDescription;  // JSON with the library's version and build hash

}  // namespace nemo
