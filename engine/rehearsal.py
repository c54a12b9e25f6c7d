"""How long will it take? A Questioner step on a few images, with the real weights, timed.

All that is random is as in a run, but nothing is kept: the weights that it trains are thrown away. A step
on few images makes less of a GPU than one on many, so the images are doubled until it takes long enough to
be believed; what is worked out from it is rather too long than too short.
"""

import gc
import time
from dataclasses import dataclass

import torch

import grpo
import questioner
import reasoner
from engine.images import Picture
from engine.ranks import Ranks
from engine.settings import Settings
from engine.shards import Trained
from vlm import VLM

ENOUGH = 10.0  # seconds: a step that takes longer is not tried with more images


@dataclass(frozen=True)
class Rehearsal:
    """The seconds of a Questioner step on so many images, and how many of its questions were valid."""

    images: int
    asking: float
    answering: float
    updating: float
    valid: int

    def questioner_step(self, s: Settings) -> float:
        """Seconds of a Questioner step."""
        return (self.asking + self.answering + self.updating) * s.images_per_step / self.images

    def curation(self, s: Settings) -> float:
        """Seconds of a curation: a question an image."""
        return (self.asking + self.answering) / s.group_size * s.candidates / self.images

    def reasoner_step(self, s: Settings) -> float:
        """Seconds of a Reasoner step: G answers to each of its questions, of which m were timed."""
        answering = self.answering / max(1, self.valid) * s.group_size / s.answers
        return (answering + self.updating / self.images) * s.images_per_step

    def iteration(self, s: Settings) -> float:
        """Seconds of an iteration, without what is measured at its end."""
        steps = s.questioner_steps * self.questioner_step(s) + s.reasoner_steps * self.reasoner_step(s)
        return steps + self.curation(s)


def rehearse(s: Settings, roles: tuple[VLM, VLM], pictures: list[Picture], ranks: Ranks) -> Rehearsal:
    """Doubles the images until a step takes ENOUGH seconds, or all pictures of a rank are used."""
    step_on(s, roles, pictures[:1], ranks)  # kernels are loaded, decoding is recorded
    count = 1
    while True:
        rehearsal = step_on(s, roles, pictures[:count], ranks)
        enough = rehearsal.asking + rehearsal.answering + rehearsal.updating >= ENOUGH
        if ranks.any(enough or count >= len(pictures)):
            return rehearsal
        count *= 2


def step_on(s: Settings, roles: tuple[VLM, VLM], pictures: list[Picture], ranks: Ranks) -> Rehearsal:
    """A Questioner step, timed; both roles are as before."""
    device = roles[0].device
    sampling = dict(max_new_tokens=s.max_new_tokens, temperature=s.temperature, top_p=s.top_p)
    sampling["generator"] = torch.Generator(device).manual_seed(s.seed)
    times = [now(device)]
    asked = questioner.ask(roles[0], pictures, s.group_size, **sampling)
    times.append(now(device))
    votes = reasoner.vote(roles[1], asked, s.answers, **sampling)
    times.append(now(device))
    # Rewards that differ, so that there is a gradient.
    rewards = [float(i % 2) for i in range(s.group_size)]
    groups = [grpo.Group(a.prompt, a.completions, rewards) for a in asked]
    memory = (s.offload, s.gradient_checkpointing, ranks)
    trained = Trained(roles[0].copy(), s.lr, s.weight_decay, *memory)
    start = now(device)  # a phase begins once, not in each step
    grpo.add_reference(groups, roles[1], s.temperature)
    grpo.update(trained, trained.optimizer, groups, s.clip, s.beta, s.temperature)
    times.append(now(device) - start)
    del trained
    gc.collect()  # the masters go, whose modules refer to one another
    valid = sum(vote is not None for group in votes for vote in group)
    return Rehearsal(len(pictures), times[1] - times[0], times[2] - times[1], times[3], valid)


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def sentence(s: Settings, rehearsal: Rehearsal, ranks: int) -> str:
    """What it says of a run on `ranks` processes, in words."""
    steps = [rehearsal.questioner_step(s), rehearsal.curation(s), rehearsal.reasoner_step(s)]
    one, two, three = (duration(seconds / ranks) for seconds in steps)
    whole = rehearsal.iteration(s) / ranks
    text = f"from a step on {rehearsal.images} images: a Questioner step takes about {one}, a curation {two}"
    if not rehearsal.valid:
        return f"{text}; no question was valid, so that how long answers take is not known"
    text += f", a Reasoner step {three}; an iteration {duration(whole)}, "
    return text + f"all {s.iterations} of them {duration(whole * s.iterations)}, measuring not counted"


def duration(seconds: float) -> str:
    """Seconds in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"
