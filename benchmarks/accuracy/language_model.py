"""A small language model, trained from scratch, pruned and distilled by the same code as vision transformers.

Text: the sources of Python's standard library, one token per byte; every eighth file is held out, and perplexity is
per byte of the held-out files. Model: 3 causal blocks of width 96, context 128. The same fraction of FFN units and of
the channels of every head is removed in one shot, scored once on 8 windows of the training text; then the pruned model
is distilled from the dense one. Writes benchmarks/results/language.json and docs/results/language.md.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.lib.python_corpus import VOCABULARY, Corpus, drawn, spread, standard_library
from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune import PruneConfig, count, plan_for
from vitprune.architectures.causal_lm import Decoder
from vitprune.config.train_config import TrainConfig
from vitprune.evaluation.losses import cross_entropy
from vitprune.pruning.cycle_masks import cycle_state, groups_for, select_cycle_masks
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.training.distillation import classification, logit_distillation
from vitprune.training.loop import train

ROOT = Path(__file__).parents[2]
CONTEXT, BATCH = 128, 8
SHAPE = {"width": 96, "depth": 3, "heads": 4}
METHODS = ("channel-magnitude", "channel-taylor", "upvits-fisher", "upvits-exact")
DISTILLED = ("channel-magnitude", "upvits-exact")


@dataclass(frozen=True)
class Size:
    """Training steps, distillation steps, sparsities, methods, and windows of the evaluation."""

    steps: int
    distillation_steps: int
    shares: tuple[float, ...]
    methods: tuple[str, ...]
    windows: int


FULL = Size(1600, 250, (0.3, 0.5), METHODS, 128)
QUICK = Size(200, 40, (0.5,), ("channel-magnitude", "upvits-exact"), 64)


@dataclass(frozen=True)
class Bench:
    """Dense model, text, and the windows for scoring and evaluation."""

    dense: nn.Module
    corpus: Corpus
    size: Size

    @property
    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """Windows of the training text for scores."""
        return spread(self.corpus.train, CONTEXT, 8, 8)

    def perplexity(self, model: nn.Module) -> float:
        """Return the perplexity per byte of the held-out files."""
        with torch.no_grad():
            windows = spread(self.corpus.held_out, CONTEXT, 32, self.size.windows)
            losses = [cross_entropy(model.eval()(tokens), after) for tokens, after in windows]
        return float(torch.stack(losses).mean().exp())


@dataclass(frozen=True)
class Pruned:
    """Result of a method at one sparsity: cost relative to dense, perplexity before and after distillation."""

    method: str
    share: float
    params: float
    macs: float
    before: float
    after: float | None
    seconds: float


def main() -> None:
    """Train, prune with every method, distil some of the models, and write the tables."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)  # two threads are not faster for a model of this size
    size = QUICK if quick else FULL
    corpus = standard_library()
    bench = Bench(dense(corpus, size), corpus, size)
    base = bench.perplexity(bench.dense)
    results = [result for method in size.methods for result in prune(bench, method)]
    bigrams = bigram_perplexity(corpus)
    rows = [Row("dense", base, "perplexity per byte", f"< {bigrams:.2f}, a bigram table", base < bigrams)]
    for case in results:
        label = f"{case.method}, {case.share:.0%} of FFN and attention"
        rows.append(Row(f"{label}, one-shot", case.before, "perplexity per byte", *promised(case, results)))
        if case.after is not None:
            rows.append(Row(f"{label}, distilled", case.after, "perplexity per byte"))
    if not quick:
        write_table(*page(bench, base, results))
    write_results("language", rows, quick)


def bigram_perplexity(corpus: Corpus) -> float:
    """Return the perplexity of a bigram table of the training text."""
    pairs = corpus.train[:-1] * VOCABULARY + corpus.train[1:]
    counts = torch.bincount(pairs, minlength=VOCABULARY**2).view(VOCABULARY, -1) + 0.1
    logarithms = (counts / counts.sum(dim=1, keepdim=True)).log()
    return float((-logarithms[corpus.held_out[:-1], corpus.held_out[1:]].mean()).exp())


def dense(corpus: Corpus, size: Size) -> nn.Module:
    """Train the dense model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(VOCABULARY, CONTEXT, **SHAPE)
    fit(classification(model), corpus, size.steps, 0.02)
    return model.eval()


def fit(task: nn.Module, corpus: Corpus, steps: int, lr: float) -> None:
    """Train a task's model on windows drawn with a fixed seed."""
    recipe = TrainConfig(epochs=1, optimizer="muon", lr=lr, weight_decay=0.05, warmup_epochs=0.1)
    train(task, lambda epoch: drawn(corpus.train, CONTEXT, BATCH, steps, epoch), steps, recipe, 0, lambda row: None)


def prune(bench: Bench, method: str) -> Iterator[Pruned]:
    """Score once; for every sparsity prune a copy, evaluate it, and distil it for some methods."""
    start = time.perf_counter()
    plans = [
        plan_for(PruneConfig(method=method, sparsity={"ffn": share, "attention": share})) for share in bench.size.shares
    ]
    groups = groups_for(bench.dense, plans[0])
    scores = plans[0].method.criterion(bench.dense, groups, bench.calibration, plans[0].context(1)).scores
    seconds = time.perf_counter() - start
    for share, plan in zip(bench.size.shares, plans, strict=True):
        model = copy.deepcopy(bench.dense)
        first = select_cycle_masks(bench.dense, scores, plan, cycle_state(bench.dense, plan)).masks
        for _ in prune_cycles(model, plan, bench.calibration, first):
            before = bench.perplexity(model)
        window = bench.calibration[0][0][:1]
        cost, dense_cost = count(model, window), count(bench.dense, window)
        after = distil(bench, model) if method in DISTILLED else None
        yield Pruned(
            method, share, cost.params / dense_cost.params, cost.macs / dense_cost.macs, before, after, seconds
        )


def distil(bench: Bench, model: nn.Module) -> float:
    """Distil and return the perplexity; KL divergences are sums over positions, so alpha divides by the context."""
    teacher = copy.deepcopy(bench.dense)  # training freezes the teacher
    fit(logit_distillation(model, teacher, 1 / CONTEXT, 1.0, 0.0), bench.corpus, bench.size.distillation_steps, 0.01)
    return bench.perplexity(model)


def promised(case: Pruned, results: list[Pruned]) -> tuple[str, bool] | tuple[None, None]:
    """Return the bound for UP-ViTs' exact score: a lower perplexity than the weight norm."""
    if case.method != "upvits-exact":
        return None, None
    rival = next(other for other in results if other.method == "channel-magnitude" and other.share == case.share)
    return f"< channel-magnitude's {rival.before:.2f}", case.before < rival.before


def page(bench: Bench, base: float, results: list[Pruned]) -> tuple[Path, str, str, list[str], list[list[str]]]:
    """Return the page: one row per method and sparsity."""
    header = ["method", "FFN and attention removed", "params", "MACs", "perplexity", "distilled", "scoring, s"]
    rows = [["dense", "", "1.00x", "1.00x", f"{base:.2f}", "", ""]]
    for case in results:
        after = "" if case.after is None else f"{case.after:.2f}"
        shares = [f"{case.share:.0%}", f"{case.params:.2f}x", f"{case.macs:.2f}x"]
        rows.append([case.method, *shares, f"{case.before:.2f}", after, f"{case.seconds:.1f}"])
    size = bench.size
    about = (
        f"{__doc__} Steps: {size.steps} of training, {size.distillation_steps} of distillation, {BATCH} windows each."
    )
    about += f" SHA-256 of the text: {bench.corpus.sha256}."
    return ROOT / "docs/results/language.md", "Pruning a small language model", about, header, rows


if __name__ == "__main__":
    main()
