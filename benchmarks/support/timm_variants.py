"""List one variant of every family of timm's models with attention: the smallest one of each structure.

Models have one structure if they are of one architecture module, have modules of the same classes, and have the same
parameters outside of blocks (position embedding, class and register tokens, norms). Attention is a class whose name
says so, or that has a number of heads; gates over channels (split attention, selective kernels) are not. Writes
benchmarks/support/timm_variants.txt: name, millions of parameters, and arguments of timm.create_model. A model above
50 million parameters is checked with two blocks, if it takes a depth.
"""

import re
from pathlib import Path
from typing import Any

import timm
import torch

LIST = Path(__file__).with_suffix(".txt")
ATTENTION = re.compile(r"(?i:attn|attention|mhsa|rel(ative)?pos|lambda)|MSA|Msa|MLA|XCA|GPSA")
GATES = {"SplitAttn", "SelectiveKernelAttn"}
LARGE = 50_000_000


def main() -> None:
    """Create every model of timm on the meta device and write the list."""
    found: dict[tuple[Any, ...], tuple[int, str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name)
            if not has_attention(model):
                continue
            classes = tuple(sorted({f"{type(one).__module__}.{type(one).__name__}" for one in model.modules()}))
            outside = {re.sub(r"\d+", "#", path) for path, _ in model.named_parameters() if path.count(".") <= 1}
            size = sum(parameter.numel() for parameter in model.parameters())
            key = (module, classes, tuple(sorted(outside)))
            found[key] = min(found.get(key, (size, name)), (size, name))
    lines = [f"{name} {size / 1e6:.1f} {_smaller(name, size)}".strip() for size, name in sorted(found.values())]
    LIST.write_text("\n".join(lines) + "\n")


def has_attention(model: torch.nn.Module) -> bool:
    """Return whether a model has a module of attention with parameters."""
    return any(
        (ATTENTION.search(type(module).__name__) or "num_heads" in vars(module))
        and type(module).__name__ not in GATES
        and any(True for _ in module.parameters())
        for module in model.modules()
    )


def read_list() -> dict[str, dict[str, int]]:
    """Return the arguments of timm.create_model by name of the variant, the smallest variant first."""
    result = {}
    for line in LIST.read_text().splitlines():
        name, _, *given = line.split()
        result[name] = {key: int(value) for key, value in (part.split("=") for part in given)}
    return result


def _smaller(name: str, size: int) -> str:
    if size <= LARGE:
        return ""
    try:
        with torch.device("meta"):
            timm.create_model(name, depth=2)
    except Exception:  # models raise various errors for an argument that they do not take
        return ""
    return "depth=2"


if __name__ == "__main__":
    main()
