"""Training loop, optimizers, checkpoints, distillation and quantization-aware training."""
