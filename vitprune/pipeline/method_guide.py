"""What each pruning method needs and what it is good for: the table of `vitprune methods` and of the documentation."""

from typing import NamedTuple


class Advice(NamedTuple):
    """What a method needs and when to use it.

    Attributes:
        images: Calibration images: none, images, or images with labels.
        time: Time of scoring DeiT-Tiny with a few hundred images on a CPU.
        use: When to use the method.
    """

    images: str
    time: str
    use: str


NONE, UNLABELLED, LABELLED = "none", "images", "with labels"

METHOD_GUIDE: dict[str, Advice] = {
    "random": Advice(NONE, "seconds", "lower bound in comparisons"),
    "magnitude": Advice(NONE, "seconds", "baseline for single weights"),
    "uniform": Advice(NONE, "seconds", "baseline for single weights, the same sparsity in every layer"),
    "lamp": Advice(NONE, "seconds", "single weights without images"),
    "dimap": Advice(NONE, "seconds", "single weights without images, hierarchical models such as Swin"),
    "taylor": Advice(LABELLED, "seconds", "first-order baseline for single weights"),
    "n:m": Advice(NONE, "seconds", "2:4 pattern without images"),
    "ovit": Advice(LABELLED, "minutes", "single weights in several cycles with fine-tuning"),
    "ovit-increments": Advice(LABELLED, "minutes", "as ovit, with another ranking"),
    "woodfisher": Advice(LABELLED, "minutes", "comparison with ovit"),
    "woodfisher-joint": Advice(LABELLED, "minutes", "comparison with ovit"),
    "fisher-diagonal": Advice(LABELLED, "seconds", "single weights with labels, less time than ovit"),
    "fastcap": Advice(LABELLED, "minutes", "single weights in large layers, less memory than ovit"),
    "obc": Advice(UNLABELLED, "minutes", "single weights or 2:4 without training: the most accurate"),
    "magnitude-obs": Advice(LABELLED, "minutes", "comparison with ovit"),
    "channel-magnitude": Advice(NONE, "seconds", "units without images; needs fine-tuning"),
    "channel-taylor": Advice(LABELLED, "seconds", "first-order baseline for units; needs fine-tuning"),
    "upvits": Advice(UNLABELLED, "minutes", "the paper's method; residual channels"),
    "upvits-literal": Advice(UNLABELLED, "hours", "verification of the faster methods"),
    "upvits-exact": Advice(UNLABELLED, "minutes", "exact scores of small models"),
    "upvits-fisher": Advice(UNLABELLED, "seconds", "units of all kinds in a short time"),
    "upvits-blocks": Advice(UNLABELLED, "minutes", "fewer blocks, or single attentions and MLPs"),
    "upvits-refit": Advice(UNLABELLED, "minutes", "the same FFN width in all blocks, which plain timm loads"),
    "upvits-global": Advice(UNLABELLED, "minutes", "fewer MACs, less time than unit-obs"),
    "unit-obs": Advice(UNLABELLED, "minutes", "fewer MACs and lower latency: the most accurate"),
    "corp": Advice(UNLABELLED, "seconds", "FFN units without labels and gradients"),
}
