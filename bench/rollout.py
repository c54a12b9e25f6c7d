"""Rollouts: `generate.generate` against transformers' `model.generate`, at equal settings.

    python bench/rollout.py --size small --prompt-tokens 300 --group-size 8 --new-tokens 48
    python bench/rollout.py --prompts 1 --questions 8 --group-size 10 --prompt-tokens 1000     a vote

Both sample at temperature 1 and with top-p 0.99 (the paper's) and write exactly --new-tokens tokens a row; a
group is `num_return_sequences` there. With --questions 8 each image has 8 prompts, which differ behind it, in
54 tokens as a question of the loop does (docs/speed.md); transformers gets those of one image at once.
"""

import dataclasses

import torch
from shapes import (
    arguments,
    compare,
    peak_extra_bytes,
    random_prompt,
    random_prompts,
    random_vlm,
    show,
)

from model.generate import generate

QUESTION = 54  # tokens


def main() -> None:
    """Both sides in turns, then the peak of each."""
    args = arguments(__doc__, questions=1)
    vlm = random_vlm(args.size, args.device, args.dtype)
    batches = [random_prompts(vlm, args)]
    if args.questions > 1:
        batches = [ask_about(vlm, image, args) for image in range(args.prompts)]
    prompts = [prompt for batch in batches for prompt in batch]
    rollouts = [plain(vlm, batch, args) for batch in batches]

    def theirs() -> None:
        for rollout in rollouts:
            rollout()

    rng, vlm.end_ids = torch.Generator(args.device).manual_seed(0), [-1]  # nothing ends early

    def ours() -> None:
        groups = generate(vlm, prompts, args.group_size, args.new_tokens, top_p=0.99, generator=rng)
        assert all(len(ids) == args.new_tokens for group in groups for ids in group)

    results, tokens = (
        compare(ours, theirs, args.device, args.repeats),
        len(prompts) * args.group_size,
    )
    for name, work in dict(ours=ours, theirs=theirs).items():
        results[f"{name}_tokens_per_s"] = tokens * args.new_tokens / results[f"{name}_s"]
        results[f"{name}_peak_mb"] = peak_extra_bytes(work, args.device) / 1e6
    show("rollout", args, results)


def ask_about(vlm, image: int, args) -> list:
    """Prompts about one image, with other words behind it."""
    one = random_prompt(vlm, args.prompt_tokens, image, behind=QUESTION)
    words = int(one.places[-1]) + 2  # the first token behind the image and its end token
    rng, prompts = torch.Generator().manual_seed(image), []
    for _ in range(args.questions):
        ids = one.ids.clone()
        ids[words:].random_(10, vlm.model.config.text_config.vocab_size - 10, generator=rng)
        prompts.append(dataclasses.replace(one, ids=ids))
    return prompts


def plain(vlm, prompts, args):
    """The same rollout by transformers, as a function; it does not end early either."""
    model = vlm.model
    inputs = dict(
        input_ids=torch.stack([p.ids for p in prompts]),
        attention_mask=torch.ones(len(prompts), args.prompt_tokens, dtype=torch.long),
        mm_token_type_ids=torch.stack(
            [(p.ids == model.config.image_token_id).int() for p in prompts]
        ),
        pixel_values=torch.cat([p.images[0].pixels for p in prompts]).to(model.dtype),
        image_grid_thw=torch.cat([p.images[0].grid for p in prompts]),
    )
    inputs = {name: value.to(args.device) for name, value in inputs.items()}
    length = dict(
        max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, eos_token_id=vlm.end_ids
    )
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=0.99)

    @torch.no_grad()
    def work() -> None:
        model.model.rope_deltas = None
        out = model.generate(**inputs, **length, **sampling, num_return_sequences=args.group_size)
        assert out.shape == (len(prompts) * args.group_size, args.prompt_tokens + args.new_tokens)

    return work


if __name__ == "__main__":
    main()
