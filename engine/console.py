"""What a run prints: the table, a row an iteration, and names on one line."""

HEADER = " iteration  greedy  sampled | valid  r_unc first-last  clusters | curated  silver right  seconds"


def row(k: int, results: dict, records: list[dict]) -> str:
    """A row of the console's table. records: those of iteration k."""
    asking = [r for r in records if r["phase"] == "questioner"]
    curation = next((r for r in records if r["phase"] == "curation"), {})
    first, last = (asking[0], asking[-1]) if asking else ({}, {})
    seconds = sum(r.get("seconds", 0.0) for r in records) if k else None
    cells = [f"{k or 'base':>10}", _cell(results.get("greedy_accuracy"), 7)]
    cells += [_cell(results.get("sampled_accuracy"), 8), " |", _cell(last.get("validity"), 5)]
    cells += [
        _cell(first.get("r_unc"), 8),
        "-",
        _cell(last.get("r_unc"), 5),
        _cell(last.get("clusters"), 9),
        " |",
    ]
    cells += [f"{curation.get('curated', '-'):>7}", _cell(results.get("silver_accuracy"), 13)]
    return " ".join([*cells, _cell(seconds, 8, 0)])


def printable(path: str) -> str:
    """A path on one line: line ends, control characters and bytes that are not UTF-8 spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def mean(values: list) -> float:
    """0.0 if there are none."""
    return sum(values) / len(values) if values else 0.0


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"
