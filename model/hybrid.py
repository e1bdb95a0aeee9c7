"""The whole model, which runs one step of packed tokens: prefill, decode, or both at once.

Legend: T tokens, D hidden size, R rows that need logits, V vocabulary.
"""

import torch
from torch import Tensor, nn

from nemotrt.model.block import Block, RMSNorm
from nemotrt.model.config import ModelConfig
from nemotrt.model.fp8 import insert_fp8_modules
from nemotrt.model.step import POOL_KINDS, Step


class Backbone(nn.Module):
    """The embeddings, layers and final norm, with the names that checkpoints use."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        # nn.Embedding would initialize the weights with random numbers, which is slow and useless here.
        vocab, hidden = config.vocab_size, config.hidden_size
        weight = torch.zeros(vocab, hidden, dtype=dtype)
        self.embeddings = nn.Embedding(vocab, hidden, _weight=weight)
        self.layers = nn.ModuleDict(
            {str(i): Block(config, kind, dtype=dtype) for i, kind in config.numbered_layers.items()}
        )
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)


class Head(nn.Module):
    """The final norm and the projection onto the vocabulary, for the rows that need logits."""

    def __init__(self, norm_f: RMSNorm, lm_head: nn.Linear) -> None:
        super().__init__()
        self.norm_f = norm_f
        self.lm_head = lm_head

    def forward(self, x_TD: Tensor, logits_row: Tensor) -> Tensor:
        """Returns FP32 logits [R, V] of the tokens at rows logits_row [R]."""
        logits_RV: Tensor = self.lm_head(self.norm_f(x_TD.index_select(0, logits_row)))
        return logits_RV.float()


class NemotronH(nn.Module):
    """The causal language model of every checkpoint in the family, for inference.

    Weights have the given dtype, except that norms, the router, A, D and dt_bias are FP32, and the modules of the
    config's recipe are FP8. Weights have no meaningful values until they are filled from a checkpoint.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device):
            self.backbone = Backbone(config, dtype=dtype)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        insert_fp8_modules(self, config.recipe)
        self.requires_grad_(False)

    def forward(
        self, input_ids: Tensor, step: Step, logits_row: Tensor, pools: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns FP32 logits [R, V] of the rows logits_row [R], and the next pools in layer order.

        The pools passed in are not modified.
        """
        x_TD = self.backbone.embeddings(input_ids)
        next_pools: list[Tensor] = []
        for kind, layer in zip(self.config.layers, self.backbone.layers.values(), strict=True):
            first = len(next_pools)
            x_TD, *layer_pools = layer(x_TD, step, *pools[first : first + len(POOL_KINDS[kind])])
            next_pools += layer_pools
        return self.head()(x_TD, logits_row), next_pools

    def head(self) -> Head:
        """The part after the layers, as a module that shares this model's parameters."""
        return Head(self.backbone.norm_f, self.lm_head)
