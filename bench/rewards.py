"""BLEU and clusters of many questions: `rewards.cluster_questions` against nltk's BLEU of every pair.

    python bench/rewards.py --questions 512

Questions are made of templates and words with a fixed seed. The nltk side computes the symmetrised
`sentence_bleu` of every pair and nothing else; ours includes the clustering.
"""

import argparse
import itertools

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from shapes import add_counts, compare, random_questions, show

import rewards


def main() -> None:
    """Both sides in turns, and whether they agree."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add_counts(parser, dict(questions=512, repeats=5))
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    args = parser.parse_args()
    args.device = "cpu"
    texts = random_questions(args.questions)
    ours, theirs = (lambda: rewards.cluster_questions(texts)), (lambda: nltk_pairs(texts))
    results = compare(ours, theirs, args.device, args.repeats)
    different = np.array([[a != b for b in texts] for a in texts])
    apart = abs(rewards.bleu_similarities(texts) - nltk_pairs(texts))[different]
    results |= dict(largest_difference=float(apart.max()), clusters=len(set(ours())))
    show("rewards", args, results)


def nltk_pairs(texts: list[str]) -> np.ndarray:
    """The similarities by nltk, a pair at a time."""
    words, similarity, smooth = (
        [t.split() for t in texts],
        np.eye(len(texts)),
        SmoothingFunction().method1,
    )
    for i, j in itertools.combinations(range(len(texts)), 2):
        there = sentence_bleu([words[i]], words[j], smoothing_function=smooth)
        back = sentence_bleu([words[j]], words[i], smoothing_function=smooth)
        similarity[i, j] = similarity[j, i] = (there + back) / 2
    return similarity


if __name__ == "__main__":
    main()
