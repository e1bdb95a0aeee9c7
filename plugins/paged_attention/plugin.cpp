// Paged attention's checks, workspace and launches, as in kernels.py.
// Legend: T tokens, B sequences, Q query heads, V key-value heads, D head dim, M pages of a sequence.
#include <algorithm>

#include "host/plan.h"

namespace nemo {

namespace {

using nvinfer1::DataType;

constexpr int64_t kDecodeRows = 16;
constexpr int64_t kDecodePrograms = 1024;
constexpr int64_t kMinSplitKeys = 128;

void check(Problem const& problem) {
    bool const is_fp8 = problem.type("CACHE") == DataType::kFP8 && problem.type("X") != DataType::kFLOAT;
    if (problem.type("CACHE") != problem.type("X") && !is_fp8) {
        throw PluginError(std::string("the kernels do not support a ") + plain_name(problem.type("CACHE")) +
                          " cache with " + plain_name(problem.type("X")) + " queries");
    }
    require_one_of(problem, "D", {64, 128});
    require_one_of(problem, "page", {64, 128, 192, 256});
    require_range(problem, "V", 1, 65535);
    require_range(problem, "T", 1, kMaxInt32);
    require_range(problem, "B", 1, 65535);
    int64_t const Q = problem["Q"];
    int64_t const V = problem["V"];
    if (Q < V || Q % V || Q / V > kDecodeRows) {
        throw PluginError("the kernels require Q to be 1 to " + std::to_string(kDecodeRows) + " times V, got Q " +
                          std::to_string(Q) + ", V " + std::to_string(V));
    }
}

int64_t short_tokens(Problem const& problem) { return kDecodeRows / (problem["Q"] / problem["V"]); }

// The maximum number of splits of the keys of the longest possible sequence.
int64_t most_splits(Problem const& problem) { return ceil_div(problem["M"] * problem["page"], kMinSplitKeys); }

int64_t num_splits(Problem const& problem) {
    int64_t const enough = kDecodePrograms / (problem["B"] * problem["V"]);
    return std::max<int64_t>(1, std::min(enough, most_splits(problem)));
}

void scratch(Problem const& problem, Plan& plan) {
    int64_t const parts = problem["B"] * most_splits(problem);
    int64_t const rows =
        short_tokens(problem) * problem["Q"] * std::max(problem["B"], std::min(kDecodePrograms / problem["V"], parts));
    plan.buffer("partial", DataType::kFLOAT, rows * problem["D"]);
    plan.buffer("lse", DataType::kFLOAT, rows);
}

void launches(Problem const& problem, Plan& plan) {
    int64_t const T = problem["T"];
    int64_t const B = problem["B"];
    int64_t const Q = problem["Q"];
    int64_t const V = problem["V"];
    int64_t const shorter = short_tokens(problem);
    plan.integer("short", shorter);
    plan.integer("splits", num_splits(problem));
    Constants const head_dim{{"D", problem["D"]}};

    Choice const append = plan.kernel("paged_append", head_dim);
    plan.launch(append, ceil_div(T, append["BLOCK_T"]), V);
    plan.launch(plan.kernel("paged_decode", head_dim), num_splits(problem), V, B);
    plan.launch(plan.kernel("paged_combine", head_dim), T <= B ? T : B * shorter, Q);
    if (T <= B) return;
    Choice const prefill = plan.kernel("paged_prefill", head_dim);
    plan.launch(prefill, T / (prefill["BLOCK_M"] / (Q / V)) + B, V);
}

}  // namespace

OpCode const kPagedAttention{check, scratch, launches};

}  // namespace nemo
