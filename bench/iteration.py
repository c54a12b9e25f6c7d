"""Where the seconds of an iteration go: one Questioner step and one Reasoner step, on random weights.

    python bench/iteration.py --size small --prompts 4 --answers 10

--prompts images get --group-size questions each; each question gets --answers answers; then --prompts curated
questions get --group-size answers. Every completion has exactly --new-tokens tokens. The loop's own functions
for generation, rewards and updates do the work; reading images, tokenising, parsing and counting votes are
left out. Parts are timed exclusively (an image encoded during a prefill counts as encode), with the GPU made
to finish at each border. There "other" is mostly the weights of offloaded roles, on their way from CPU
memory.
"""

import time
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
from shapes import arguments, random_prompts, random_questions, random_vlm, show, synchronize

import grpo
import rewards
from model import generate, logprobs
from training.policy import Trained


class Stopwatch(ExitStack):
    """Adds up the seconds that are spent in the watched functions, each second in the innermost of them."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.parts = ["other"]
        self.spent = Counter()
        self.last = time.perf_counter()

    def lap(self) -> None:
        """Counts what has passed since the last lap for the innermost function."""
        synchronize(self.device)
        now = time.perf_counter()
        self.spent[self.parts[-1]] += now - self.last
        self.last = now

    def clear(self) -> None:
        """Begins anew."""
        self.lap()
        self.spent.clear()

    def timed(self, function, part: str):
        """Returns the function, timed."""

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
        """Times a function of a module, or a method, until the stopwatch is closed."""
        self.replace(owner, name, self.timed(getattr(owner, name), part))

    def replace(self, owner, name: str, new) -> None:
        """Puts something in a function's place, until the stopwatch is closed."""
        self.enter_context(mock.patch.object(owner, name, new))


def main() -> None:
    """Two iterations; the second is measured."""
    args = arguments(__doc__, answers=10)
    role = random_vlm(args.size, args.device, args.dtype)
    role.end_ids = [-1]  # nothing ends early
    role.offload()
    reference = role.copy()
    policy = Trained(role, lr=1e-6, weight_decay=1e-2)
    with Stopwatch(args.device) as watch:
        watch_rollouts(watch)
        watch_updates(watch, policy)
        watch.watch(rewards, "questioner_rewards", "rewards")
        iteration(args, policy, reference)  # warm-up: libraries, allocators, moments
        watch.clear()
        start = time.perf_counter()
        iteration(args, policy, reference)
        watch.lap()
    results = {"total_s": time.perf_counter() - start}
    for part, spent in watch.spent.most_common():
        results |= {f"{part} (s)": spent, f"{part} (%)": 100 * spent / results["total_s"]}
    show("iteration", args, results)


def watch_rollouts(watch: Stopwatch) -> None:
    """Names the parts of a rollout."""
    watch.watch(generate, "embed", "encode images")
    watch.watch(generate, "prefill", "prefill")
    watch.watch(generate, "prefill_tails", "prefill")
    watch.watch(generate, "sample", "sampling")
    capture = generate.capture_graph

    def capture_and_time(step, *rest):
        return watch.timed(watch.timed(capture, "record graphs")(step, *rest), "decode")

    watch.replace(generate, "capture_graph", capture_and_time)


def watch_updates(watch: Stopwatch, policy: Trained) -> None:
    """Names the parts of an update; where there are masters, the plain copy is made anew after it."""
    watch.watch(logprobs, "embed", "encode images")
    watch.watch(logprobs.PackedForward, "__call__", "log-probabilities")
    watch.watch(torch.Tensor, "backward", "backward")
    watch.watch(torch.nn.utils, "clip_grad_norm_", "optimizer")
    watch.watch(policy.optimizer, "step", "optimizer")
    watch.watch(policy, "refresh", "refresh")


def iteration(args, policy: Trained, reference) -> None:
    """A Questioner step with its votes, and a Reasoner step."""
    rng = torch.Generator(args.device).manual_seed(0)
    sampling = dict(max_new_tokens=args.new_tokens, top_p=0.99, generator=rng)
    prompts = random_prompts(policy.vlm, args)
    for voting in (True, False):
        completions = generate.generate(policy.vlm, prompts, args.group_size, **sampling)
        if voting:
            asked = [prompt for prompt in prompts for _ in range(args.group_size)]
            generate.generate(reference, asked, args.answers, **sampling)
        texts = [random_questions(args.group_size, seed) for seed in range(args.prompts)]
        reward = [rewards.questioner_rewards(t, [i / len(t) for i in range(len(t))]) for t in texts]
        groups = [grpo.make_group(p, c, r) for p, c, r in zip(prompts, completions, reward)]
        grpo.add_reference(groups, reference)
        grpo.update(policy, policy.optimizer, groups)


if __name__ == "__main__":
    main()
