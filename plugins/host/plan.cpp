#include "plan.h"

#include <array>
#include <cstring>
#include <limits>

namespace nemo {

using nvinfer1::DataType;

namespace {

constexpr size_t kWorkspaceAlignment = 256;
constexpr uint64_t kKernelAlignment = 16;
constexpr size_t kMaxArguments = 48;
constexpr int kFirstSmWithFp8 = 89;

bool is_pointer(Parameter const& parameter) { return parameter.type[0] == '*'; }

char const* renamed(Renames const& renames, char const* name) {
    for (auto const& [parameter, meaning] : renames) {
        if (!std::strcmp(parameter, name)) return meaning;
    }
    return name;
}

char const* constant(KernelRow const& row, char const* name) {
    for (Constant const& entry : row.constants) {
        if (!std::strcmp(entry.name, name)) return entry.value;
    }
    throw std::logic_error(std::string(row.variant) + " has no constant " + name);
}

// Code for SM 9.x and later runs on exactly that SM; older code also runs on later SMs of the same major version.
SmRow const& compiled_for(OpRow const& op, int sm) {
    SmRow const* best = nullptr;
    std::string have;
    for (SmRow const& row : op.sms) {
        have += (have.empty() ? "" : ", ") + std::to_string(row.sm);
        bool const same_major = row.sm / 10 == sm / 10 && sm < 90;
        if (row.sm == sm || (same_major && row.sm <= sm && (!best || row.sm > best->sm))) best = &row;
    }
    if (best) return *best;
    if (have.empty()) throw PluginError("this plugin library was built without kernels of this op");
    throw PluginError("this plugin library has kernels for SM " + have + ", not for SM " + std::to_string(sm));
}

void refuse_fp8(Problem const& problem, int sm) {
    for (DtypeRow const& row : problem.op.dtypes) {
        if (problem.type(row.name) == DataType::kFP8) {
            throw PluginError("SM " + std::to_string(sm) +
                              " has no FP8 tensor cores: use float16 or bfloat16, or a GPU with SM 89 or later");
        }
    }
}

template <class T>
uint64_t bits_of(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

}  // namespace

int64_t Choice::operator[](char const* name) const { return std::stoll(constant(*row, name)); }

Plan::Plan(Problem const& problem, int sm) : problem_(problem) {
    OpCode const& code = *problem.op.code;
    code.check(problem);
    code.scratch(problem, *this);
    if (!sm) return;
    sm_ = &compiled_for(problem.op, sm);
    if (sm_->sm < kFirstSmWithFp8) refuse_fp8(problem, sm);
    code.launches(problem, *this);
}

void Plan::buffer(char const* name, DataType type, int64_t count) {
    buffers_.push_back({name, {Argument::Kind::kWorkspace, workspace_bytes, type}});
    auto const bytes = static_cast<size_t>(count * num_bytes(type));
    workspace_bytes += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

void Plan::integer(char const* name, int64_t value) { integers_.emplace_back(name, value); }

std::optional<Plan::Pointer> Plan::pointer(char const* name) const {
    OpRow const& op = problem_.op;
    for (int i = 0; i < op.inputs.count; ++i) {
        if (!std::strcmp(op.inputs[i].name, name)) {
            return Pointer{Argument::Kind::kInput, static_cast<size_t>(i), problem_.type(op.inputs[i])};
        }
    }
    for (int i = 0; i < op.outputs.count; ++i) {
        if (!std::strcmp(op.outputs[i].name, name)) {
            return Pointer{Argument::Kind::kOutput, static_cast<size_t>(i), problem_.type(op.outputs[i])};
        }
    }
    for (Buffer const& buffer : buffers_) {
        if (!std::strcmp(buffer.name, name)) return buffer.pointer;
    }
    return std::nullopt;
}

bool Plan::fits(KernelRow const& row, Constants const& constants, Renames const& renames) const {
    for (Wanted const& wanted : constants) {
        if (constant(row, wanted.name) != wanted.value) return false;
    }
    for (Parameter const& parameter : row.parameters) {
        if (!is_pointer(parameter)) continue;
        std::optional<Pointer> const target = pointer(renamed(renames, parameter.name));
        if (!target || std::strcmp(parameter.type + 1, triton_name(target->type))) return false;
    }
    return true;
}

std::string Plan::form(char const* name, Constants const& constants) const {
    std::string text = std::string("kernel ") + name + " for SM " + std::to_string(sm_->sm);
    for (Wanted const& constant : constants) text += std::string(", ") + constant.name + " " + constant.value;
    for (DtypeRow const& row : problem_.op.dtypes) {
        text += std::string(", ") + row.name + " in " + plain_name(problem_.type(row.name));
    }
    return text;
}

std::vector<Choice> Plan::kernels(char const* name, Constants const& constants, Renames const& renames) const {
    std::vector<Choice> found;
    for (KernelRow const& row : sm_->kernels) {
        if (!std::strcmp(row.kernel, name) && fits(row, constants, renames)) found.push_back({&row, renames});
    }
    if (found.empty()) throw PluginError("this plugin library was built without " + form(name, constants));
    return found;
}

Choice Plan::kernel(char const* name, Constants const& constants, Renames const& renames) const {
    std::vector<Choice> const found = kernels(name, constants, renames);
    if (found.size() > 1) throw std::logic_error("more than one variant of " + form(name, constants));
    return found[0];
}

void Plan::launch(Choice const& choice, int64_t grid_x, int64_t grid_y, int64_t grid_z) {
    constexpr int64_t kMost[] = {std::numeric_limits<int32_t>::max(), 65535, 65535};
    int64_t const grid[] = {grid_x, grid_y, grid_z};
    Launch launch{choice.row, {}, {}, nullptr};
    for (int i = 0; i < 3; ++i) {
        if (grid[i] < 1 || grid[i] > kMost[i]) {
            throw PluginError(std::string(choice.row->kernel) + " needs " + std::to_string(grid[i]) +
                              " programs on axis " + std::to_string(i) + ", but CUDA allows 1 to " +
                              std::to_string(kMost[i]));
        }
        launch.grid[i] = static_cast<unsigned>(grid[i]);
    }
    for (Parameter const& parameter : choice.row->parameters) {
        launch.arguments.push_back(bind(parameter, renamed(choice.renames, parameter.name)));
    }
    if (launch.arguments.size() + choice.row->hidden_pointers > kMaxArguments) {
        throw std::logic_error(std::string(choice.row->kernel) + " has too many parameters");
    }
    launches.push_back(std::move(launch));
}

Argument Plan::bind(Parameter const& parameter, char const* name) const {
    if (!is_pointer(parameter)) return value(parameter, name);
    Pointer const target = pointer(name).value();  // `fits` has checked that it exists
    return {target.kind, target.index, 0, name, parameter.aligned};
}

Argument Plan::value(Parameter const& parameter, char const* name) const {
    Argument argument{Argument::Kind::kValue, 0, 0, name, parameter.aligned};
    std::string const type = parameter.type;
    if (type == "fp32") {
        argument.bits = bits_of(problem_.real(name));
        return argument;
    }
    int64_t const* set = nullptr;
    for (auto const& entry : integers_) {
        if (!std::strcmp(entry.first, name)) set = &entry.second;
    }
    int64_t const integer = set ? *set : problem_[name];
    if (parameter.aligned && integer % static_cast<int64_t>(kKernelAlignment)) {
        throw PluginError(std::string("the kernels require ") + name + " to be a multiple of 16, got " +
                          std::to_string(integer));
    }
    if (type == "i64") {
        argument.bits = bits_of(integer);
    } else if (type == "i32") {
        if (integer != static_cast<int32_t>(integer)) {
            throw PluginError(std::string(name) + " = " + std::to_string(integer) + " does not fit in 32 bits");
        }
        argument.bits = bits_of(static_cast<int32_t>(integer));
    } else {
        throw std::logic_error(std::string("unknown argument type ") + parameter.type);
    }
    return argument;
}

void load(std::vector<Launch>& launches, Device device) {
    for (Launch& launch : launches) launch.function = load(*launch.row, device);
}

void run(std::vector<Launch> const& launches, void const* const* inputs, void* const* outputs, void* workspace,
         cudaStream_t stream) {
    for (Launch const& launch : launches) {
        std::array<uint64_t, kMaxArguments> values{};
        std::array<void*, kMaxArguments> places{};
        size_t count = 0;
        for (Argument const& argument : launch.arguments) {
            void const* address = nullptr;
            switch (argument.kind) {
                case Argument::Kind::kInput: address = inputs[argument.index]; break;
                case Argument::Kind::kOutput: address = outputs[argument.index]; break;
                case Argument::Kind::kWorkspace: address = static_cast<char*>(workspace) + argument.index; break;
                case Argument::Kind::kValue: break;
            }
            bool const is_value = argument.kind == Argument::Kind::kValue;
            values[count] = is_value ? argument.bits : bits_of(address);
            if (!is_value && argument.aligned && values[count] % kKernelAlignment) {
                throw PluginError(std::string("the address of ") + argument.name + " is not a multiple of 16 bytes");
            }
            ++count;
        }
        count += launch.row->hidden_pointers;  // Triton's scratch buffers of size 0 are null
        for (size_t i = 0; i < count; ++i) places[i] = &values[i];
        nemo::launch(launch.function, *launch.row, launch.grid, places.data(), stream);
    }
}

std::string json(std::vector<Launch> const& launches) {
    std::string text = "[";
    for (Launch const& launch : launches) {
        text += text.size() > 1 ? ",\n " : "";
        text += std::string("{\"variant\": \"") + launch.row->variant + "\", \"grid\": [";
        for (int i = 0; i < 3; ++i) text += (i ? ", " : "") + std::to_string(launch.grid[i]);
        text += "], \"arguments\": [";
        for (size_t i = 0; i < launch.arguments.size(); ++i) {
            Argument const& argument = launch.arguments[i];
            text += std::string(i ? ", " : "") + "[\"" + argument.name + "\", ";
            bool const is_value = argument.kind == Argument::Kind::kValue;
            text += (is_value ? std::to_string(argument.bits) : "null") + "]";
        }
        text += "]}";
    }
    return text + "]";
}

}  // namespace nemo
