// The causal convolution's checks and launches, as in kernels.py. Legend: T tokens, B sequences, C channels.
#include "host/plan.h"

namespace nemo {

namespace {

void check(Problem const& problem) {
    require_multiple(problem, "C", 16);
    require_range(problem, "K", 2, 4);
    require_range(problem, "T", 1, kMaxInt32);
    require_range(problem, "B", 1, 65535);
}

void scratch(Problem const&, Plan&) {}

void launches(Problem const& problem, Plan& plan) {
    int64_t const T = problem["T"];
    int64_t const B = problem["B"];
    int64_t const C = problem["C"];
    Constants const taps{{"TAPS", problem["K"]}};
    // conv_sequences handles sequences of up to `walk` tokens; if T > B, conv_tokens handles the tokens of all others.
    plan.integer("walk", T <= B ? T : problem["K"] - 1);
    Choice const sequences = plan.kernel("conv_sequences", taps);
    plan.launch(sequences, ceil_div(C, sequences["BLOCK_C"]), B);
    if (T <= B) return;
    Choice const tokens = plan.kernel("conv_tokens", taps);
    plan.launch(tokens, ceil_div(C, tokens["BLOCK_C"]), ceil_div(T, tokens["BLOCK_T"]));
}

}  // namespace

OpCode const kCausalConv1d{check, scratch, launches};

}  // namespace nemo
