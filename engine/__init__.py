"""The machinery behind the algorithm: flags, the run folder, its state, images, checkpoints, processes,
memory."""
