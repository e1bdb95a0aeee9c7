// The experts' checks, workspace and launches, as in kernels.py.
// Legend: T tokens, L expert input size, R routed experts, E experts here, I inner size. A slot is one token's choice
// of one expert.
#include <algorithm>

#include "host/plan.h"

namespace nemo {

namespace {

using nvinfer1::DataType;

constexpr int64_t kMaxExperts = 512;
constexpr int64_t kMaxTopK = 32;
constexpr int64_t kChunkTokens = 128;

bool is_fp8(Problem const& problem) { return problem.type("W") == DataType::kFP8; }

void check(Problem const& problem) {
    if (problem.type("W") != problem.type("X") && !is_fp8(problem)) {
        throw PluginError(std::string("the kernels do not support ") + plain_name(problem.type("W")) +
                          " weights with x in " + plain_name(problem.type("X")) +
                          ": weights must have x's dtype or float8_e4m3fn");
    }
    require_multiple(problem, "L", 16);
    require_multiple(problem, "I", 16);
    require_range(problem, "R", 1, kMaxExperts);
    require_range(problem, "E", 1, kMaxExperts);
    require_range(problem, "top_k", 1, std::min(kMaxTopK, problem["R"]));
    require_range(problem, "num_groups", 1, problem["R"]);
    if (problem["R"] % problem["num_groups"]) throw PluginError("num_groups does not divide the number of experts");
    require_range(problem, "topk_group", 1, problem["num_groups"]);
    require_range(problem, "first_expert", 0, kMaxInt32);
}

int64_t num_slots(Problem const& problem) { return problem["T"] * problem["top_k"]; }

int64_t block_of_experts(Problem const& problem) {
    return std::max(problem["R"], problem["E"]) <= 128 ? 128 : kMaxExperts;
}

// Each expert with rows may have one partial block.
int64_t most_blocks(Problem const& problem, int64_t rows_per_block) {
    int64_t const slots = num_slots(problem);
    return slots / rows_per_block + std::min(problem["E"], slots);
}

void scratch(Problem const& problem, Plan& plan) {
    int64_t const T = problem["T"];
    int64_t const slots = num_slots(problem);
    int64_t const block = block_of_experts(problem);
    plan.buffer("experts", DataType::kINT32, slots);
    plan.buffer("weights", DataType::kFLOAT, slots);
    plan.buffer("ranks", DataType::kINT8, T * block);
    plan.buffer("counts", DataType::kINT32, ceil_div(T, kChunkTokens) * block);
    plan.buffer("slots", DataType::kINT32, slots);
    plan.buffer("blocks", DataType::kINT32, 3 * most_blocks(problem, 16));
    plan.buffer("hidden", problem.type("W"), slots * problem["I"]);
    plan.buffer("parts", DataType::kFLOAT, slots * problem["L"]);
    if (is_fp8(problem)) plan.buffer("x_fp8", DataType::kFP8, T * problem["L"]);
}

// Returns the tile of a product that fits the average number of rows per expert.
Choice tile_for(std::vector<Choice> tiles, int64_t rows, int64_t columns) {
    std::sort(tiles.begin(), tiles.end(), [](Choice const& left, Choice const& right) {
        return std::pair(left["BLOCK_M"], left["BLOCK_N"]) < std::pair(right["BLOCK_M"], right["BLOCK_N"]);
    });
    if (tiles.size() == 1 || rows <= tiles[0]["BLOCK_M"]) return tiles[0];
    if (tiles.size() == 2 || rows <= tiles[1]["BLOCK_M"]) return tiles[1];
    int64_t const wide = tiles.back()["BLOCK_N"];
    // Use the wide tile if padding the columns to it costs at most a sixteenth.
    return ceil_div(columns, wide) * wide * 16 <= columns * 17 ? tiles.back() : tiles[2];
}

void launch_routing(Problem const& problem, Plan& plan) {
    int64_t const T = problem["T"];
    int64_t const chunks = ceil_div(T, kChunkTokens);
    int64_t const block = block_of_experts(problem);
    if (is_fp8(problem)) {
        Choice const route = plan.kernel("route_and_quantize_kernel", {{"BLOCK_R", block}});
        plan.launch(route, T, ceil_div(problem["L"], route["BLOCK_L"]) + 1);
    } else {
        plan.launch(plan.kernel("route_kernel", {{"BLOCK_R", block}}), T);
    }
    bool const has_counts = T > kChunkTokens;
    Constants const chunked{{"BLOCK_E", block}, {"CHUNK", kChunkTokens}};
    if (has_counts) plan.launch(plan.kernel("count_kernel", chunked), chunks);
    if (T == 1) return;  // the slots of a single token are its blocks
    Constants const placed{{"BLOCK_E", block}, {"CHUNK", kChunkTokens}, {"COUNTED", has_counts}};
    plan.launch(plan.kernel("place_kernel", placed), chunks);
}

void launches(Problem const& problem, Plan& plan) {
    int64_t const T = problem["T"];
    int64_t const L = problem["L"];
    int64_t const I = problem["I"];
    if (!T) return;
    bool const is_direct = T == 1;
    int64_t const rows = num_slots(problem) / problem["R"];

    Renames renames;
    if (is_direct) renames.emplace_back("blocks", "experts");
    Choice const down = tile_for(plan.kernels("down_kernel", {{"DIRECT", is_direct}}, renames), rows, L);
    if (is_fp8(problem)) renames.emplace_back("x", "x_fp8");
    Constants const rounded{{"DIRECT", is_direct}, {"ROUND", triton_name(problem.type("X"))}};
    Choice const up = tile_for(plan.kernels("up_kernel", rounded, renames), rows, I);
    int64_t const blocks = is_direct ? num_slots(problem) : most_blocks(problem, up["BLOCK_M"]);
    plan.integer("num_chunks", ceil_div(T, kChunkTokens));
    plan.integer("max_blocks", blocks);
    plan.integer("block_rows", up["BLOCK_M"]);

    launch_routing(problem, plan);
    plan.launch(up, blocks * ceil_div(I, up["BLOCK_N"]));
    plan.launch(down, blocks * ceil_div(L, down["BLOCK_N"]));
    Choice const combine = plan.kernel("combine_kernel", {{"BLOCK_TOP_K", problem["top_k"] <= 8 ? 8 : kMaxTopK}});
    plan.launch(combine, T, ceil_div(L, combine["BLOCK_L"]));
}

}  // namespace

OpCode const kMoeDispatch{check, scratch, launches};

}  // namespace nemo
