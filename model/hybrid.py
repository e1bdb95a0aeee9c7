"""The whole model over packed tokens.

Legend: T tokens, D hidden size, R rows that want logits, V vocabulary.
"""

import torch
from torch import Tensor, nn

from nemotrt.model.block import Block
from nemotrt.model.config import ModelConfig
from nemotrt.model.fp8 import quantize
from nemotrt.model.norm import RMSNorm
from nemotrt.model.pools import POOL_KINDS
from nemotrt.model.step import Step


class Backbone(nn.Module):
    """Embeddings, layers and final norm, under the names that checkpoints use."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        # Embedding's own initialisation draws random numbers for weights that a checkpoint fills.
        vocab, hidden = config.vocab_size, config.hidden_size
        weight = torch.zeros(vocab, hidden, dtype=dtype, device=device)
        self.embeddings = nn.Embedding(vocab, hidden, _weight=weight)
        self.layers = nn.ModuleDict(
            {
                str(i): Block(config, kind, dtype=dtype, device=device)
                for i, kind in config.numbered_layers.items()
            }
        )
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps, device=device)


class Head(nn.Module):
    """The final norm and the projection onto the vocabulary, for the rows that want logits."""

    def __init__(self, norm_f: RMSNorm, lm_head: nn.Linear) -> None:
        super().__init__()
        self.norm_f = norm_f
        self.lm_head = lm_head

    def forward(self, x_TD: Tensor, logits_row: Tensor) -> Tensor:
        """[T, D] and the rows [R] → FP32 logits [R, V]."""
        logits_RV: Tensor = self.lm_head(self.norm_f(x_TD.index_select(0, logits_row)))
        return logits_RV.float()


class NemotronH(nn.Module):
    """The causal language model: one implementation for every checkpoint of the family, for inference.

    Weights are in `dtype`, but for the FP32 of norms, the router, A, D and dt_bias, and for the FP8 of the
    modules that the configuration's recipe names. A new model's weights
    mean nothing until a checkpoint fills them (`checkpoint.load_into`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, dtype=dtype, device=device)
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=device
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        quantize(self, config.recipe)
        self.requires_grad_(False)

    def forward(
        self, input_ids: Tensor, step: Step, logits_row: Tensor, pools: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Token ids [T], rows [R] that want logits, pools in layer order → FP32 logits [R, V], next pools.

        The pools passed in are left as they are.
        """
        x_TD = self.backbone.embeddings(input_ids)
        next_pools: list[Tensor] = []
        for kind, layer in zip(self.config.layers, self.backbone.layers.values(), strict=True):
            first = len(next_pools)
            x_TD, *replaced = layer(x_TD, step, *pools[first : first + len(POOL_KINDS[kind])])
            next_pools += replaced
        return self.head()(x_TD, logits_row), next_pools

    def head(self) -> Head:
        """The part after the layers, as a module that shares this model's parameters."""
        return Head(self.backbone.norm_f, self.lm_head)
