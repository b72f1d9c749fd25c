"""Benchmarks; run one as a module: python -m benchmarks.speed.kl_scoring."""
