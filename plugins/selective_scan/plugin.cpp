// The selective scan's checks, workspace and launches, as in kernels.py.
// Legend: T tokens, B sequences, H heads, P head dim, G groups, N state size; a chunk is Q tokens of one sequence.
#include <algorithm>

#include "host/plan.h"

namespace nemo {

namespace {

using nvinfer1::DataType;

constexpr int64_t kStepTokens = 8;
constexpr int64_t kFullGpu = 96;
constexpr int64_t kWalkers = 1024;
constexpr int64_t kLeastChunk = 32;
constexpr int64_t kMostChunk = 64;

void check(Problem const& problem) {
    if (problem.type("X") == DataType::kFLOAT && problem.type("STATE") != DataType::kFLOAT) {
        throw PluginError(std::string("the kernels do not support a ") + plain_name(problem.type("STATE")) +
                          " state with float32 x");
    }
    require_one_of(problem, "N", {128, 256});
    int64_t const P = problem["P"];
    if (P % 32 && !(P == 80 && problem["N"] == 128)) {
        throw PluginError("the kernels require P to be a multiple of 32, or 80 with N 128, got " + std::to_string(P) +
                          " with N " + std::to_string(problem["N"]));
    }
    require_range(problem, "P", 32, kMaxInt32);
    require_range(problem, "G", 1, kMaxInt32);
    require_multiple(problem, "H", problem["G"]);
    require_range(problem, "H", 1, kMaxInt32);
    require_range(problem, "T", 1, kMaxInt32);
    require_range(problem, "B", 1, 65535);
}

bool has_chunks(Problem const& problem) { return problem.type("X") != DataType::kFLOAT; }

// True for FP32, if T ≤ B as in decode, or if there are too few tokens for a longer sequence.
bool is_step(Problem const& problem) {
    return !has_chunks(problem) || problem["T"] <= std::max(problem["B"], kStepTokens);
}

// The maximum over all GPUs and over all steps up to this size: the chunk size depends on the GPU, and a smaller step
// may have chunks even if this one has none. Large chunks need more memory each; small chunks are more numerous.
void scratch(Problem const& problem, Plan& plan) {
    if (!has_chunks(problem)) return;
    int64_t const large_chunks = problem["T"] / kMostChunk + problem["B"];
    int64_t const small_chunks = problem["T"] / kLeastChunk + problem["B"];
    plan.buffer("products", problem.type("X"), large_chunks * problem["G"] * kMostChunk * kMostChunk);
    plan.buffer("decays", DataType::kFLOAT, large_chunks * problem["H"] * 2 * kMostChunk);
    plan.buffer("scales", DataType::kFLOAT, small_chunks * problem["H"] * 3);
}

// Returns the part of a head that one program scans: the widest that divides a head and gives every SM a program.
Choice piece(Problem const& problem, std::vector<Choice> const& forms) {
    int64_t const P = problem["P"];
    Choice const* narrow = nullptr;
    for (Choice const& form : forms) {
        int64_t const columns = form["P"];
        if (form["TAIL"] && P == columns + form["TAIL"]) return form;
        if (form["TAIL"]) continue;
        if (columns == 64 && P % columns == 0 && problem["H"] * P / columns >= kFullGpu) return form;
        if (!narrow || columns < (*narrow)["P"]) narrow = &form;
    }
    if (!narrow) throw PluginError("this plugin library was built without narrow pieces of scan_sequences");
    return *narrow;
}

void launches(Problem const& problem, Plan& plan) {
    int64_t const B = problem["B"];
    int64_t const P = problem["P"];
    int64_t const N = problem["N"];
    int64_t const columns = problem["H"] * P;
    plan.integer("num_tokens", problem["T"]);
    plan.integer("num_sequences", B);
    plan.integer("num_heads", problem["H"]);
    plan.integer("num_groups", problem["G"]);
    plan.integer("head_dim", P);
    plan.integer("step_tokens", is_step(problem) ? problem["T"] : kStepTokens);
    if (!is_step(problem)) {
        Choice const prepare = plan.kernel("prepare_chunks", {{"N", N}});
        plan.launch(prepare, problem["T"] / prepare["Q"] + B + 1, problem["G"]);
        Choice const scan = piece(problem, plan.kernels("scan_sequences", {{"N", N}}));
        int64_t const walkers = columns / (scan["P"] + scan["TAIL"]);
        plan.launch(scan, walkers, std::min(B, ceil_div(kWalkers, walkers)));
    }
    int64_t const rows = P % 32 == 0 && N == 128 ? 32 : 16;
    plan.launch(plan.kernel("step_sequences", {{"N", N}, {"ROWS", rows}}), columns / rows, B);
}

}  // namespace

OpCode const kSelectiveScan{check, scratch, launches};

}  // namespace nemo
