"""Rollouts: `generate.generate` against transformers' `model.generate(num_return_sequences=G)`, at equal settings.

    python bench/rollout.py --size small --prompt-tokens 300 --group-size 8 --new-tokens 48

Both sample at temperature 1 and with top-p 0.99 (the paper's) and write exactly --new-tokens tokens a row.
"""

import torch
from shapes import arguments, compare, peak_extra_bytes, random_prompt, random_vlm, show

from generate import generate


def main() -> None:
    args = arguments(__doc__)
    vlm = random_vlm(args.size, args.device, args.dtype)
    prompts = [random_prompt(vlm, args.prompt_tokens, seed=i) for i in range(args.prompts)]
    rng = torch.Generator(args.device).manual_seed(0)
    end_ids, vlm.end_ids = vlm.end_ids, [-1]  # nothing ends early, on either side

    def ours() -> None:
        groups = generate(vlm, prompts, args.group_size, args.new_tokens, top_p=0.99, generator=rng)
        assert all(len(ids) == args.new_tokens for group in groups for ids in group)

    inputs = dict(
        input_ids=torch.stack([p.ids for p in prompts]),
        attention_mask=torch.ones(len(prompts), args.prompt_tokens, dtype=torch.long),
        mm_token_type_ids=torch.stack([(p.ids == vlm.model.config.image_token_id).int() for p in prompts]),
        pixel_values=torch.cat([p.pixels for p in prompts]),
        image_grid_thw=torch.cat([p.grid for p in prompts]),
    )
    inputs = {name: value.to(args.device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(vlm.model.dtype)
    length = dict(max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, eos_token_id=end_ids)
    sampling = dict(
        num_return_sequences=args.group_size, do_sample=True, temperature=1.0, top_k=0, top_p=0.99
    )

    @torch.no_grad()
    def theirs() -> None:
        vlm.model.model.rope_deltas = None
        out = vlm.model.generate(**inputs, **length, **sampling)
        assert out.shape == (len(prompts) * args.group_size, args.prompt_tokens + args.new_tokens)

    results = compare(ours, theirs, args.device, args.repeats)
    tokens = len(prompts) * args.group_size * args.new_tokens
    results |= dict(
        ours_tokens_per_s=tokens / results["ours_s"], theirs_tokens_per_s=tokens / results["theirs_s"]
    )
    results |= dict(
        ours_peak_mb=peak_extra_bytes(ours, args.device) / 1e6,
        theirs_peak_mb=peak_extra_bytes(theirs, args.device) / 1e6,
    )
    show("rollout", args, results)


if __name__ == "__main__":
    main()
