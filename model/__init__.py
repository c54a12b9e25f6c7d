"""The vision-language model: prompts, log-probabilities, generation, and a file for each family."""
