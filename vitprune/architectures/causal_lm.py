"""Causal language model built from timm's transformer Block."""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class Decoder(nn.Module):
    """Causal language model: token and position embeddings, pre-norm blocks, LayerNorm and classifier.

    It has the attributes of timm's models that training and pruning read, such as `feature_info`.

    Args:
        vocabulary: Number of tokens of the vocabulary.
        context: Maximum number of input tokens.
        width: Embedding dimension.
        depth: Number of blocks.
        heads: Number of attention heads.
        mlp_ratio: Hidden units of an MLP per channel of the embedding.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.num_classes, self.context, self.in_chans = vocabulary, context, 1
        self.embed_dim = self.num_features = self.head_hidden_size = width
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,), "context_length": context}
        self.pretrained_cfg |= {"first_conv": "token_embed", "classifier": "head"}
        self.feature_info = [{"num_chs": width, "module": f"blocks.{index}"} for index in range(depth)]
        self.token_embed = nn.Embedding(vocabulary, width)
        self.pos_embed = nn.Parameter(torch.empty(1, context, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for weight in (self.token_embed.weight, self.pos_embed):
            nn.init.normal_(weight, std=0.1)
        for name, parameter in self.blocks.named_parameters():
            if ".attn.proj." in name or ".mlp.fc2." in name:  # zero, so that every block is the identity at first
                nn.init.zeros_(parameter)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the residual stream (B, T, width) of tokens (B, T)."""
        embedded: Tensor = self.token_embed(tokens)
        return embedded + self.pos_embed[:, : tokens.shape[1]]

    def forward_features(self, tokens: Tensor) -> Tensor:
        """Return the input of the classifier, (B, T, width)."""
        stream = self.embed(tokens)
        for block in self.blocks:
            stream = block(stream, is_causal=True)
        normed: Tensor = self.norm(stream)
        return normed

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of features, or the features if `pre_logits` is set."""
        return features if pre_logits else self.head(features)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the next-token logits (B, T, vocabulary) of tokens (B, T)."""
        return self.forward_head(self.forward_features(tokens))
