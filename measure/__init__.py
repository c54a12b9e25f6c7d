"""Measurements beside the algorithm: a run's own numbers, labelled questions, scores, charts."""
