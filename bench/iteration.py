"""Where the seconds of one iteration go, part by part: one Questioner step and one Reasoner step, on random weights.

    python bench/iteration.py --size small --prompts 4 --answers 10

--prompts images get --group-size questions each; each question gets --answers answers; then --prompts curated questions
get --group-size answers. Every completion has exactly --new-tokens tokens. The loop's own functions for generation,
rewards and updates do the work; reading images, tokenising, parsing and counting votes are left out. Parts are timed
exclusively (an image encoded during a prefill counts as encode), with the GPU made to finish at each border.
"""

import time
from collections import Counter

import torch
from shapes import arguments, random_prompt, random_questions, random_vlm, show, synchronize

import generate
import grpo
import rewards
import vlm as vlm_module


class Stopwatch:
    """Adds up the seconds that are spent in the wrapped functions, each second in the innermost of them."""

    def __init__(self, device: str):
        self.device, self.parts, self.spent, self.last = device, ["other"], Counter(), time.perf_counter()

    def lap(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.spent[self.parts[-1]] += now - self.last
        self.last = now

    def timed(self, function, part: str):
        def run(*args, **kwargs):
            self.lap()
            self.parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.lap()
                self.parts.pop()

        return run

    def watch(self, owner, name: str, part: str) -> None:
        setattr(owner, name, self.timed(getattr(owner, name), part))


def main() -> None:
    args = arguments(__doc__, answers=10)
    watch = Stopwatch(args.device)
    watch.watch(vlm_module.VLM, "embed", "encode images")
    watch.watch(vlm_module.VLM, "_batch_logprobs", "log-probabilities")
    watch.watch(generate, "prefill", "prefill")
    watch.watch(generate, "sample", "sampling")
    watch.watch(torch.Tensor, "backward", "backward")
    watch.watch(grpo.MasterAdamW, "step", "optimizer")
    watch.watch(rewards, "questioner_rewards", "rewards")
    recorded = generate.recorded  # on CUDA it makes a graph, which is timed as a step too when it is replayed
    generate.recorded = lambda step, *rest: watch.timed(
        watch.timed(recorded, "record graphs")(step, *rest), "decode"
    )

    policy = random_vlm(args.size, args.device, args.dtype)
    reference, policy.end_ids = policy.copy(), [-1]
    reference.end_ids = [-1]
    with grpo.MasterAdamW(policy.model.named_parameters(), 1e-6, 1e-2) as optimizer:
        iteration(args, policy, reference, optimizer)  # warm-up: libraries, allocators, moments
        watch.lap()
        watch.spent.clear()
        start = time.perf_counter()
        iteration(args, policy, reference, optimizer)
        watch.lap()
        total = time.perf_counter() - start
    results = {"total_s": total}
    for part, spent in watch.spent.most_common():
        results[f"{part} (s)"], results[f"{part} (%)"] = spent, 100 * spent / total
    show("iteration", args, results)


def iteration(args, policy, reference, optimizer) -> None:
    """A Questioner step with its votes, and a Reasoner step."""
    rng = torch.Generator(args.device).manual_seed(0)
    prompts = [random_prompt(policy, args.prompt_tokens, seed) for seed in range(args.prompts)]
    for voting in (True, False):
        completions = generate.generate(
            policy, prompts, args.group_size, args.new_tokens, top_p=0.99, generator=rng
        )
        if voting:
            asked = [p for p in prompts for _ in range(args.group_size)]
            generate.generate(reference, asked, args.answers, args.new_tokens, top_p=0.99, generator=rng)
        texts = [random_questions(args.group_size, seed) for seed in range(args.prompts)]
        reward = [rewards.questioner_rewards(t, [i / len(t) for i in range(len(t))]) for t in texts]
        groups = [grpo.Group(p, c, r) for p, c, r in zip(prompts, completions, reward)]
        grpo.add_reference(groups, reference)
        grpo.update(policy, groups, optimizer)


if __name__ == "__main__":
    main()
