"""KL-divergence importance (UP-ViTs): exact, second-order and leave-one-out."""
