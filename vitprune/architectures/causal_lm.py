"""A causal language model of timm's own blocks, and its groups: what is pruned in a ViT is pruned in it alike."""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitprune.architectures import parts, vit
from vitprune.architectures.chain import Branch, Chain, Perceptron, Step
from vitprune.groups import Group, ParamSlice


class Decoder(nn.Module):
    """Token and position embeddings, pre-norm blocks that look back only, a norm and a head.

    `context` is the largest number of tokens. What else timm's models carry about themselves is here too: its training
    tasks ask for it, and cutting a ViT keeps it up to date.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.num_classes, self.context, self.in_chans = vocabulary, context, 1
        self.embed_dim = self.num_features = self.head_hidden_size = width
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}
        self.feature_info = [{"num_chs": width, "module": f"blocks.{index}"} for index in range(depth)]
        self.token_embed = nn.Embedding(vocabulary, width)
        self.pos_embed = nn.Parameter(torch.empty(1, context, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for weight in (self.token_embed.weight, self.pos_embed):
            nn.init.normal_(weight, std=0.1)
        for name, parameter in self.blocks.named_parameters():
            if ".attn.proj." in name or ".mlp.fc2." in name:  # a branch starts by adding nothing
                nn.init.zeros_(parameter)

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream (B, T, width) of tokens (B, T)."""
        embedded: Tensor = self.token_embed(tokens)
        return embedded + self.pos_embed[:, : tokens.shape[1]]

    def forward_features(self, tokens: Tensor) -> Tensor:
        """What the head reads, (B, T, width)."""
        stream = self.embed(tokens)
        for block in self.blocks:
            stream = block(stream, is_causal=True)
        normed: Tensor = self.norm(stream)
        return normed

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features, or the features themselves."""
        return features if pre_logits else self.head(features)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of the token that follows each of tokens (B, T)."""
        return self.forward_head(self.forward_features(tokens))


def groups(model: Any, kind: str) -> list[Group]:
    """All groups of one kind, named as in a ViT.

    Raises:
        BadInput: a block, attention, MLP or norm of the model is of a type that is not understood.
    """
    return [_stream(model)] if kind == "residual" else vit.groups(model, kind)


def _stream(model: Any) -> Group:
    """Channels of the residual stream, from the embeddings to the head."""
    paths = [f"blocks.{index}" for index in range(len(model.blocks))]
    writers = [f"{path}.{leaf}" for path in paths for leaf in ("attn.proj", "mlp.fc2")]
    readers = [f"{path}.{leaf}" for path in paths for leaf in ("attn.qkv", "mlp.fc1")]
    norms = [f"{path}.{leaf}" for path in paths for leaf in ("norm1", "norm2")]
    embeddings = ParamSlice("token_embed.weight", 1), ParamSlice("pos_embed", 2)
    found = embeddings + parts.stream(model, writers, [*readers, "head"], [*norms, "norm"])
    return Group("residual", "residual", (model.embed_dim,), found, resize=_resize_width)


def _resize_width(model: Any, shape: tuple[int, ...]) -> None:
    vit.resize_width(model, shape)
    model.token_embed.embedding_dim = shape[0]


def chain(model: Any) -> Chain:
    """The two branches of every block, then norm and head; the answer is (B, T, vocabulary)."""
    steps: list[Step] = []
    for index, block in enumerate(model.blocks):
        path, attn, mlp, whole = f"blocks.{index}", partial(block.attn, is_causal=True), block.mlp, nn.Identity()
        steps += [
            Branch(f"{path}.attn", "attention", block.norm1, attn, whole, block.attn.proj),
            Branch(f"{path}.mlp", "ffn", block.norm2, mlp, whole, mlp.fc2, Perceptron(mlp.fc1, mlp.act)),
        ]
    return Chain(model.embed, tuple(steps), (model.norm, model.head))
