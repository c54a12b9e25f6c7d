"""What a run writes down and prints: the record of a step, the table with a row an iteration, names on one
line."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import torch

from curate import Example
from engine.ranks import Ranks
from grpo import group_advantages

RUNGS = ("1-2", "3-4", "5-6", "7-9")  # objects that a question about built-in scenes asks to list
HEADER = (
    f"iteration greedy sampled  {'  '.join(RUNGS)} | valid  r_unc first-last clusters"
    " | curated objects right seconds"
)


def row(k: int, results: dict, records: list[dict]) -> str:
    """A row of the console's table. records: those of iteration k."""
    asking = [r for r in records if r["phase"] == "questioner"]
    curation = next((r for r in records if r["phase"] == "curation"), {})
    third = max(1, len(asking) // 3)  # single steps may fall where a phase rises
    seconds = sum(r.get("seconds", 0.0) for r in records) if k else None
    rungs = results.get("sampled_by_objects", {})
    cells = [f"{k or 'base':>9}", _cell(results.get("greedy_accuracy"), 6)]
    cells += [_cell(results.get("sampled_accuracy"), 7), *(_cell(rungs.get(name), 4, 2) for name in RUNGS)]
    first, last = asking[:third], asking[-third:]
    cells += ["|", _cell(_mean_of("validity", last), 5), _cell(_mean_of("r_unc", first), 8), "-"]
    cells += [_cell(_mean_of("r_unc", last), 6), _cell(_mean_of("clusters", last), 8, 1)]
    cells += ["|", f"{curation.get('curated', '-'):>7}", _cell(results.get("objects"), 7, 1)]
    return " ".join([*cells, _cell(results.get("silver_accuracy"), 5, 2), _cell(seconds, 7, 0)])


def printable(path: str) -> str:
    """A path on one line: line ends, control characters and bytes that are not UTF-8 spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def mean(values: list) -> float:
    """0.0 if there are none."""
    return sum(values) / len(values) if values else 0.0


def _mean_of(name: str, records: list[dict]) -> float | None:
    """The mean of a number in the records that have it; None if none has."""
    values = [record[name] for record in records if record.get(name) is not None]
    return mean(values) if values else None


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def plain(value):
    """A number as JSON has it: rounded, null for what is not finite."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def skipped_in_a_row(records: list[dict]) -> int:
    """How many of the last GRPO steps were skipped."""
    skipped = [record["skipped"] for record in records if "skipped" in record]
    return len(list(takewhile(bool, reversed(skipped))))


def of_groups(groups: list, end_ids: list[int], seconds: float, ranks: Ranks) -> dict:
    """What a GRPO step wrote, over the groups of all processes."""
    mine = [[g.rewards, [[len(c), not c or c[-1] not in end_ids] for c in g.completions]] for g in groups]
    rewards, completions = zip(*(ranks.gather(mine) or [([], [])]))
    lengths = [length for group in completions for length, _ in group]
    return dict(
        reward=mean([r for group in rewards for r in group]),
        equal_groups=mean([all_equal(group) for group in rewards]),
        length=mean(lengths),
        truncated=mean([cut for group in completions for _, cut in group]),
        tokens_per_second=sum(lengths) / max(seconds, 1e-9),
    )


def all_equal(rewards: list[float]) -> bool:
    """Whether these rewards of a group teach nothing: 0.1 and 1 - 0.9 are the same to GRPO."""
    return bool(rewards) and not group_advantages(torch.tensor([rewards])).any()


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Writes examples as JSON lines; the bytes of a path that are not UTF-8 are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in examples]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def read_examples(path: Path) -> list[Example]:
    """Reads what `write_examples` wrote."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    return [Example(**json.loads(line)) for line in text.split("\n") if line]
