"""llm-compressor: Wanda and SparseGPT on the same weights in the ViT of transformers, block by block."""

import re
from collections.abc import Mapping

import torch
from job import Job, run
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

HEADS, FFN, CLASSES, EPS = 3, 768, 1000, 1e-6
MODIFIERS = {"SparseGPT": SparseGPTModifier, "Wanda": WandaPruningModifier}
NAMES = {  # timm -> transformers
    r"^cls_token$": "vit.embeddings.cls_token",
    r"^pos_embed$": "vit.embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "vit.embeddings.patch_embeddings.projection.",
    r"^blocks\.(\d+)\.norm1\.": r"vit.layers.\1.layernorm_before.",
    r"^blocks\.(\d+)\.norm2\.": r"vit.layers.\1.layernorm_after.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"vit.layers.\1.attention.o_proj.",
    r"^blocks\.(\d+)\.mlp\.": r"vit.layers.\1.mlp.",
    r"^norm\.": "vit.layernorm.",
    r"^head\.": "classifier.",
}


def pruned(job: Job) -> Mapping[str, Tensor]:
    """Return the weights after pruning within rows (Wanda) or layers (SparseGPT)."""
    weights = job.weights
    width = weights["norm.weight"].numel()
    config = ViTConfig(
        hidden_size=width,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        num_labels=CLASSES,
        layer_norm_eps=EPS,
        hidden_act="gelu",
        attn_implementation="eager",
    )
    model = ViTForImageClassification(config).eval()
    model.load_state_dict(to_transformers(weights))
    images, _ = job.batches[0]
    with torch.no_grad():
        difference = (model(pixel_values=images[:2]).logits - job.timm_model()(images[:2])).abs().max()
    if difference > 1e-3:
        raise SystemExit(f"the logits of timm and transformers differ by {float(difference)}")
    model.save_pretrained(job.folder / "vit")  # llm-compressor reads the configuration again
    model = ViTForImageClassification.from_pretrained(job.folder / "vit", attn_implementation="eager")
    loader = DataLoader([{"pixel_values": image} for batch, _ in job.batches for image in batch], batch_size=10)
    recipe = MODIFIERS[job.method](
        sparsity=0.5 if job.pattern else job.sparsity, mask_structure=job.pattern or "0:0", ignore=["re:.*classifier"]
    )
    model = oneshot(model=model, processor=ViTImageProcessor(), dataset=loader, recipe=[recipe])
    return from_transformers(model.state_dict(), weights)


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's weights by the names of transformers; queries, keys and values are separate layers."""
    result = {}
    for name, value in weights.items():
        fused = re.match(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name)
        if fused:
            block, kind = fused.groups()
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                result[f"vit.layers.{block}.attention.{part}_proj.{kind}"] = chunk.clone()
        else:
            result[_renamed(name)] = value
    return result


def from_transformers(found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by timm's names."""
    result = {}
    for name in weights:
        fused = re.match(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name)
        if fused:
            block, kind = fused.groups()
            result[name] = torch.cat([found[f"vit.layers.{block}.attention.{part}_proj.{kind}"] for part in "qkv"])
        else:
            result[name] = found[_renamed(name)]
    return result


def _renamed(name: str) -> str:
    for pattern, replacement in NAMES.items():
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            return renamed
    raise SystemExit(f"{name}: has no counterpart in transformers")


if __name__ == "__main__":
    run(pruned, "llmcompressor", "transformers")
