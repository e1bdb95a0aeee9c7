"""FP8 (E4M3) linears with FP32 scales for weight and input, and how they replace the model's linears.

Legend: T tokens, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn

from nemotrt.model.recipe import EXPERTS, Recipe
from nemotrt.plugins.e4m3 import FP8, to_e4m3


@torch.library.custom_op("nemo::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """[T, I] → [T, O]: multiplies E4M3 values, sums in FP32, scales, and rounds once to x's dtype.

    The weight's E4M3 values may be stored as FP32.
    """
    product_TO = to_e4m3(x, input_scale).float() @ weight.float().T * (weight_scale * input_scale)
    return (product_TO if bias is None else product_TO + bias.float()).to(x.dtype)


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class Fp8Linear(nn.Module):
    """A linear with weight E4M3 · weight_scale, whose input is rounded to E4M3 · input_scale."""

    def __init__(self, linear: nn.Linear, *, per_channel: bool) -> None:
        """Takes the shape and bias of `linear`; the weight is filled later."""
        super().__init__()
        shape, device = linear.weight.shape, linear.weight.device
        scale_shape = shape[:1] if per_channel else ()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=FP8, device=device), requires_grad=False)
        self.bias = linear.bias
        self.weight_scale = nn.Parameter(torch.ones(scale_shape, device=device), requires_grad=False)
        self.input_scale = nn.Parameter(torch.ones((), device=device), requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] → [T, O], in the same dtype."""
        y_TO: Tensor = fp8_linear(x_TI, self.weight, self.weight_scale, self.input_scale, self.bias)
        return y_TO


def insert_fp8_modules(network: nn.Module, recipe: Recipe) -> None:
    """Replace the recipe's modules of a NemotronH by FP8 modules, whose weights are filled later."""
    for name in sorted(recipe.modules):
        module = network.get_submodule(name)
        if name.endswith(f".{EXPERTS}"):
            for weight in ("up", "down"):
                empty = torch.zeros_like(module.get_parameter(weight), dtype=FP8)
                setattr(module, weight, nn.Parameter(empty, requires_grad=False))
        else:
            assert isinstance(module, nn.Linear), name
            network.set_submodule(name, Fp8Linear(module, per_channel=name in recipe.per_channel))


def widen(network: nn.Module) -> None:
    """Store the FP8 linears' weights as FP32 without changing their values, so that no step has to cast them."""
    for module in network.modules():
        if isinstance(module, Fp8Linear):
            module.weight = nn.Parameter(module.weight.float(), requires_grad=False)
