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


NONE, UNLABELED, LABELED = "none", "images", "with labels"

METHOD_GUIDE: dict[str, Advice] = {
    "random": Advice(NONE, "seconds", "lower bound in comparisons"),
    "magnitude": Advice(NONE, "seconds", "baseline for single weights"),
    "uniform": Advice(NONE, "seconds", "baseline for single weights, the same sparsity in every layer"),
    "lamp": Advice(NONE, "seconds", "single weights without images"),
    "dimap": Advice(NONE, "seconds", "single weights without images, hierarchical models such as Swin"),
    "taylor": Advice(LABELED, "seconds", "first-order baseline for single weights"),
    "n:m": Advice(NONE, "seconds", "2:4 pattern without images"),
    "ovit": Advice(LABELED, "minutes", "single weights in several cycles with fine-tuning"),
    "ovit-increments": Advice(LABELED, "minutes", "as ovit, with another ranking"),
    "woodfisher": Advice(LABELED, "minutes", "comparison with ovit"),
    "woodfisher-joint": Advice(LABELED, "minutes", "comparison with ovit"),
    "fisher-diagonal": Advice(LABELED, "seconds", "single weights with labels, less time than ovit"),
    "fastcap": Advice(LABELED, "minutes", "single weights in large layers, less memory than ovit"),
    "obc": Advice(UNLABELED, "minutes", "single weights or 2:4 without training: the most accurate"),
    "magnitude-obs": Advice(LABELED, "minutes", "comparison with ovit"),
    "channel-magnitude": Advice(NONE, "seconds", "units without images; needs fine-tuning"),
    "channel-taylor": Advice(LABELED, "seconds", "first-order baseline for units; needs fine-tuning"),
    "upvits": Advice(UNLABELED, "hours", "the paper's method; residual channels"),
    "upvits-literal": Advice(UNLABELED, "days", "verification of the faster methods"),
    "upvits-exact": Advice(UNLABELED, "hours", "exact scores of small models"),
    "upvits-fisher": Advice(UNLABELED, "minutes", "units of all kinds in a short time"),
    "upvits-blocks": Advice(UNLABELED, "minutes", "fewer blocks, or single attentions and MLPs"),
    "upvits-refit": Advice(UNLABELED, "minutes", "the same FFN width in all blocks, which plain timm loads"),
    "upvits-global": Advice(UNLABELED, "minutes", "fewer MACs, less time than unit-obs"),
    "unit-obs": Advice(UNLABELED, "minutes", "fewer MACs and lower latency: the most accurate"),
    "corp": Advice(UNLABELED, "seconds", "FFN units without labels and gradients"),
}
