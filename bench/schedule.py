"""Counts what a Questioner step does on a GPU, and estimates its seconds. No GPU, no weights.

    python bench/schedule.py --size 3b --card h100

The real schedule of a rollout runs over drawn lengths (geometric, cut off at 1,024 tokens). From its counts
and the stated rates of a card (training/estimate.py) follow seconds: an estimate, nothing was measured.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from shapes import SIZES, shape_config

from training import memory_plan as plan
from training.estimate import CARDS, Case, describe, estimate
from training.settings import Settings


def main() -> None:
    """Prints counts and seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3b", help="a published shape")
    parser.add_argument("--card", choices=CARDS, default="h100", help="a GPU")
    parser.add_argument("--images", type=int, default=128, help="images of a step")
    parser.add_argument("--image-tokens", type=int, default=1024, help="of an image")
    parser.add_argument("--text-tokens", type=int, default=80, help="of a prompt besides")
    parser.add_argument("--offload", action="store_true", help="as of loop.py")
    parser.add_argument("--lora-rank", type=int, default=0, help="as of loop.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    s = Settings(images_per_step=args.images, offload=args.offload, lora_rank=args.lora_rank)
    work = plan.Work(
        args.image_tokens,
        args.text_tokens,
        s.max_new_tokens,
        s.group_size,
        args.images * s.group_size,
        s.answers,
    )
    case = Case(shape_config(args.size), s, work, CARDS[args.card])
    results = estimate(case)
    print(json.dumps(results) if args.json else describe(args.card, results))


if __name__ == "__main__":
    main()
