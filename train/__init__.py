"""How parameters move: loop, optimizers, checkpoints, trackers. Knows nothing of speculative decoding."""
