r"""Rewards: what is a good question, and what is a good answer (VisPlay, arXiv 2511.15661, section 3).

The Reasoner answers a question m times: y_1 .. y_m. The majority answer is the silver label, its share the
confidence:

    y~ = argmax_y  sum_j 1[y_j = y]          c = (1/m) sum_j 1[y_j = y~]              -> confidence
    y_j = y if they say the same; 5 counts for 5 cm where no vote says 5 mm          -> count_votes

The Questioner asks G questions x_1 .. x_G about one image; C_k is the BLEU cluster that x_i falls in:

    r_unc(x_i) = 1 - |2 c_i - 1|                                                     -> uncertainty_reward
    r_div(x_i) = lambda |C_k| / G                                                    -> diversity_penalty
    r(x_i)     = 1[x_i valid] max(0, r_unc(x_i) - r_div(x_i))                        -> questioner_rewards

The Reasoner's own reward for an answer y to a curated question is 1[y = y~]         -> answer_reward

The official code differs from the paper: it scores min(c, 1 - c) in place of r_unc (the same tent, half as
high), subtracts the cluster's share of the *whole batch* instead of one image's group, and does not clip at
0. This file follows the paper. The similarity is BLEU as in the official code: words split at white space,
smoothing method 1. But it is the mean of both directions, where the official code takes one, and scripts
without spaces are split into characters.
"""

import math
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from answers import (
    AS_NUMBER,
    Parts,
    agrees,
    compose,
    read_parts,
    same_answer,  # noqa: F401  other programs import it here
    says_something,
)

# Without a home nltk cannot be imported, unless it is told a folder for its data, which nothing here needs.
os.environ.setdefault("NLTK_DATA", tempfile.gettempdir())
from nltk.util import ngrams  # noqa: E402


@dataclass(frozen=True)
class Candidate:
    """An answer with all of its votes: its label, and how often each spelling was given, in order."""

    label: str
    spellings: dict[str, int]

    @property
    def votes(self) -> int:
        """The number of votes."""
        return sum(self.spellings.values())


def confidence(answers: Sequence[str | None]) -> tuple[str | None, float]:
    """Returns the silver label y~ and its share c of the m answers (the paper's confidence).

    None stands for an answer that could not be parsed. It counts in m and never wins; the same holds for one
    that says nothing ("..."). A tie goes to the answer that appeared first. Without any answer: (None, 0.0).
    """
    candidates = count_votes(answers)
    if not candidates:
        return None, 0.0
    # max keeps the first of equals, and the candidates are in order of appearance.
    winner = max(candidates, key=lambda candidate: candidate.votes)
    return winner.label, winner.votes / len(answers)


def count_votes(answers: Sequence[str | None]) -> list[Candidate]:
    """Counts the votes of each answer, in order of first appearance.

    Votes with equal parts (`answers.read_parts`) are for one answer. A vote that leaves out a unit, a sign or
    a name joins those that state it, if all votes for its value that state one state the same:

        5, 5 cm, 5 cm      5 cm: 3            5, 5 cm, 5 mm     5: 1, 5 cm: 1, 5 mm: 1
        50, 50%            50%: 2             50, 50%, 0.5      50: 1, 0.5: 2

    The label is the first vote that states most: a reward can then part 5 mm from it. It is 0.5 rather than
    50%.
    """
    given = []
    written = []
    for answer in answers:
        if answer is not None and says_something(answer):
            given.append(answer)
            written.append(read_parts(answer))
    # 50% is 0.5 if a vote says 0.5, else it is 50 with a sign.
    bare = {parts.value for parts in written if not parts.unit}
    read = []
    for parts in written:
        number = parts.as_number()
        read.append(number if number.value in bare else parts)
    # Units and names that are stated for a value, in either reading.
    units = defaultdict(set)
    names = defaultdict(set)
    for parts in written + read:
        if parts.unit:
            units[parts.value].add(parts.unit)
        if parts.name:
            names[parts.value].add(parts.name)
    # Each vote is given what it leaves out.
    candidates: dict[Parts, list[tuple[Parts, str]]] = defaultdict(list)
    for answer, own, parts in zip(given, written, read):
        unit = parts.unit or _the_only(units[parts.value])
        name = parts.name or _the_only(names[parts.value])
        full = Parts(parts.value, unit, name)
        candidates[full].append((own, answer))
    return [_candidate(full, votes) for full, votes in candidates.items()]


def _the_only(stated: set[str]) -> str:
    """Returns the unit or name that is given to a vote without one; "" if none, or several, are stated.

    0.5 always joins 50%.
    """
    if AS_NUMBER in stated:
        return AS_NUMBER
    return next(iter(stated)) if len(stated) == 1 else ""


def _candidate(full: Parts, votes: list[tuple[Parts, str]]) -> Candidate:
    """Returns the answer with these votes; full: what they state together."""
    unit = "" if full.unit == AS_NUMBER else full.unit  # 0.5, not 50%

    def states(vote: tuple[Parts, str]) -> tuple[bool, bool]:
        own, _ = vote
        return own.unit == unit, own.name == full.name

    _, label = max(votes, key=states)
    spellings = Counter(answer for _, answer in votes)
    return Candidate(label, dict(spellings))


def answer_reward(answer: str | None, label: str) -> float:
    """Returns the Reasoner's reward: 1 if the answer equals the silver label, else 0.

    A unit, a sign or a name that only one of them states is not compared: 5 equals 5 cm, and 5 mm does not.
    """
    return float(answer is not None and agrees(answer, label))


def to_floats(given: Iterable, count: int, function: Callable) -> list[float]:
    """Returns `count` rewards that a researcher's own function gave as floats.

    They may be numbers of any kind: of numpy, of torch, bools. Raises ValueError, with a sentence that names
    the function, for anything else, and for NaN and infinity.
    """
    name = getattr(function, "__name__", repr(function))
    try:
        values = list(given)
    except TypeError:
        raise ValueError(
            f"{name} returns {_on_one_line(given)} in place of a list of rewards"
        ) from None
    if len(values) != count:
        raise ValueError(f"{name} returns {len(values)} rewards for {count} outputs")
    numbers = []
    for value in values:
        is_text_or_array = isinstance(value, (str, bytes)) or getattr(value, "ndim", 0) > 0
        try:
            number = math.nan if is_text_or_array else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"{name} returns the reward {_on_one_line(value)}: it must be a finite number"
            )
        numbers.append(number)
    return numbers


def _on_one_line(value: object) -> str:
    return " ".join(repr(value).split())[:100]


# ---- Questions ----


def uncertainty_reward(c: float) -> float:
    """r_unc = 1 - |2c - 1|: highest (1) when half of the answers agree, 0 when all agree or c is 0."""
    return 1.0 - abs(2.0 * c - 1.0)


_UNSPACED = (  # Chinese, Japanese, and the scripts of south-east Asia; Korean has spaces
    "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u1950-\u19ff"  # Thai, Lao, Tibetan, Burmese, Khmer, Tai Lue
    "\u2e80-\u2fff\u3001-\u312f\u31a0-\ua4cf\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Splits a text at white space, and scripts without spaces into characters."""
    return _WORD.findall(compose(text))


def bleu_similarities(texts: Sequence[str]) -> np.ndarray:
    """Returns the matrix [n, n] of `bleu_similarity` of all pairs of texts.

    Each text's n-grams are counted once. The k-th occurrence of an n-gram in a text is one item. So the
    clipped count of common n-grams, sum_g min(count_a(g), count_b(g)), is the number of common items. With a
    text's items as a row of zeros and ones, one matrix product gives it for all pairs.
    """
    split = [words(text) for text in texts]
    length = np.array([len(w) for w in split], dtype=float)
    pairs = (len(texts), len(texts))
    log_precision = np.zeros(pairs)  # [hypothesis, reference]
    for n in range(1, 5):
        items = [_occurrences(ngrams(w, n)) for w in split]
        common = _count_common_items(items)
        total = np.maximum(1, length - n + 1)
        smoothed = np.where(common > 0, common, 0.1)  # method 1: 0 becomes 0.1
        log_precision += np.log(smoothed / total[:, None]) / 4
        if n == 1:
            nothing_in_common = common == 0

    # BLEU of each text (row) against each other one (column), then the mean of both directions.
    ratio = length[None, :] / np.maximum(1, length)[:, None]
    brevity = np.exp(np.minimum(0, 1 - ratio))
    bleu = brevity * np.exp(log_precision)
    bleu = np.where(nothing_in_common, 0.0, bleu)
    similarity = (bleu + bleu.T) / 2

    # The same words in the same order give 1, also where there are fewer than four.
    numbers, _ = _number([tuple(w) for w in split])
    numbers = np.array(numbers)
    equal = numbers[:, None] == numbers[None, :]
    return np.where(equal, 1.0, similarity)


def _count_common_items(items: list[list]) -> np.ndarray:
    """Counts the items that two of n lists have in common: [n, n]. The items of a list are all different."""
    columns, count = _number(item for row in items for item in row)
    lengths = [len(row) for row in items]
    rows = np.repeat(np.arange(len(items)), lengths)
    shape = (len(items), count)
    occurs = np.zeros(shape, dtype=np.float32)  # whole numbers are exact up to 2^24
    occurs[rows, columns] = 1
    common = occurs @ occurs.T
    return common.astype(float)


def _occurrences(grams: Iterable) -> list[tuple]:
    """Numbers equal n-grams: [a, b, a] -> [(a, 1), (b, 1), (a, 2)]."""
    seen: Counter = Counter()
    items = []
    for gram in grams:
        seen[gram] += 1
        items.append((gram, seen[gram]))
    return items


def _number(items: Iterable) -> tuple[list[int], int]:
    """Gives each item a number, equal for equal ones; returns the numbers, and how many there are."""
    number: dict = {}
    return [number.setdefault(item, len(number)) for item in items], len(number)


def bleu_similarity(a: str, b: str) -> float:
    """Returns the mean of BLEU(a | b) and BLEU(b | a): symmetric, in [0, 1]; 1 for the same words in order.

    Equal to nltk's `sentence_bleu` with smoothing method 1, symmetrised; the exception is a question of fewer
    than four words against itself, which nltk scores below 1 for want of 4-grams.
    """
    return float(bleu_similarities([a, b])[0, 1])


def cluster_questions(questions: Sequence[str], threshold: float = 0.5) -> list[int]:
    """Clusters questions by average linkage of the distances 1 - bleu_similarity.

    The two nearest clusters are merged while their mean distance is below `threshold`. Returns a label per
    question: 0, 1, ... in order of first appearance. The work is done on the sorted texts. So ties are broken
    by what the questions say, and the clusters do not depend on the order they come in.
    """
    texts = sorted(questions)
    distance = 1.0 - bleu_similarities(texts)
    np.fill_diagonal(distance, np.inf)
    cluster_of: dict[str, int] = {}
    for number, members in enumerate(_average_linkage(distance, threshold)):
        cluster_of |= {texts[i]: number for i in members}
    labels, _ = _number(cluster_of[question] for question in questions)
    return labels


def _average_linkage(distance: np.ndarray, threshold: float) -> list[list[int]]:
    """Merges by mean distance (UPGMA); returns the members of each cluster.

    distance: [n, n], symmetric, infinite on the diagonal.
    """
    members = [[i] for i in range(len(distance))]
    while len(members) > 1:
        # The two nearest clusters.
        nearest = int(distance.argmin())
        a, b = sorted(divmod(nearest, len(members)))
        if not distance[a, b] < threshold:
            break
        # The distance to their union is the mean over all pairs of members.
        size_a = len(members[a])
        size_b = len(members[b])
        total = size_a * distance[a] + size_b * distance[b]
        merged = total / (size_a + size_b)
        merged[a] = np.inf
        distance[a] = merged
        distance[:, a] = merged
        # Cluster b goes.
        distance = np.delete(np.delete(distance, b, axis=0), b, axis=1)
        members[a] += members.pop(b)
    return members


def diversity_penalty(
    questions: Sequence[str], weight: float = 1.0, group_size: int | None = None
) -> list[float]:
    """r_div = lambda |C_k| / G for each valid question of one image; `weight` is the paper's lambda.

    group_size: G, which counts invalid questions, too; by default the number of these questions.
    """
    labels = cluster_questions(questions)
    sizes = Counter(labels)
    return [weight * sizes[label] / (group_size or len(questions)) for label in labels]


def questioner_rewards(
    questions: Sequence[str | None], confidences: Sequence[float], weight: float = 1.0
) -> list[float]:
    """r = 1[valid] max(0, r_unc - r_div) for the G questions of one image; None is an invalid question.

    Only valid questions are clustered, and G counts all of them. So a question's penalty
    is the same whether the others are invalid or merely different.
    """
    valid = [question for question in questions if question is not None]
    penalties = iter(diversity_penalty(valid, weight, len(questions)))
    rewards = []
    for question, c in zip(questions, confidences, strict=True):
        if question is None:
            rewards.append(0.0)
        else:
            rewards.append(max(0.0, uncertainty_reward(c) - next(penalties)))
    return rewards
