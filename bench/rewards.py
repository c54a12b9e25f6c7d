"""BLEU and clusters of many questions: `rewards.cluster_questions` against nltk's `sentence_bleu` on every pair.

    python bench/rewards.py --questions 512

Questions are made of templates and words with a fixed seed. The nltk side computes the symmetrised BLEU of every pair
and nothing else; ours includes the clustering.
"""

import argparse
import itertools

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from shapes import compare, count, random_questions, show

import rewards


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--questions", type=count, default=512, help="how many questions")
    parser.add_argument("--repeats", type=count, default=5, help="measurements of each side")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    args.device = "cpu"
    texts, smooth = random_questions(args.questions), SmoothingFunction().method1

    def nltk_pairs() -> np.ndarray:
        words, similarity = [text.split() for text in texts], np.eye(len(texts))
        for i, j in itertools.combinations(range(len(texts)), 2):
            both = (
                sentence_bleu([words[i]], words[j], smoothing_function=smooth),
                sentence_bleu([words[j]], words[i], smoothing_function=smooth),
            )
            similarity[i, j] = similarity[j, i] = sum(both) / 2
        return similarity

    results = compare(lambda: rewards.cluster_questions(texts), nltk_pairs, "cpu", args.repeats)
    different = np.array([[a != b for b in texts] for a in texts])
    results["largest_difference"] = float(
        abs(rewards.bleu_similarities(texts) - nltk_pairs())[different].max()
    )
    results["clusters"] = len(set(rewards.cluster_questions(texts)))
    show("rewards", args, results)


if __name__ == "__main__":
    main()
