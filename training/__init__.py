"""A run around the algorithm: flags, folder, state, images, processes, the role in training, the plan."""
