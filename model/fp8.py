"""FP8 linears: a weight in E4M3 with FP32 scales, and inputs that are quantized on their way in.

Legend: T tokens, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn

from nemotrt.model.recipe import EXPERTS, Recipe
from nemotrt.plugins.e4m3 import FP8, quantized


@torch.library.custom_op("nemo::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """[T, I] → [T, O]: the product of E4M3 values summed in FP32, scaled, and rounded once, to x's dtype.

    The weight may hold its E4M3 values in FP32.
    """
    product_TO = quantized(x, input_scale).float() @ weight.float().T * (weight_scale * input_scale)
    return (product_TO if bias is None else product_TO + bias.float()).to(x.dtype)


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class Fp8Linear(nn.Module):
    """A linear whose weight is E4M3 · weight_scale, and whose input is rounded to E4M3 · input_scale."""

    def __init__(self, linear: nn.Linear, *, per_channel: bool) -> None:
        """In the place of `linear`, whose shape and bias it takes; the weight is to be filled."""
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


def quantize(network: nn.Module, recipe: Recipe) -> None:
    """Put FP8 modules, to be filled, in the place of those of NemotronH that the recipe names."""
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
    """Hold the linears' weights in FP32, their values as they are: they are not cast in each step then."""
    for module in network.modules():
        if isinstance(module, Fp8Linear):
            module.weight = nn.Parameter(module.weight.float(), requires_grad=False)
