"""The reports of evaluate.py as text."""

from engine.records import printable


def table(reports: dict[str, dict]) -> str:
    """The comparisons with the first model, then the scores of all models side by side."""
    first = next(iter(reports))
    means = list(reports[first]["scores"]["all"]["intervals"])
    heads = [f"{name.removesuffix('_accuracy'):>18}" for name in means]
    comparisons, rows = [], [("model", "kind", f"{'n':>5}", *heads, f"{'ece':>6}")]
    for model, report in reports.items():
        for name, c in report.get("against_first", {}).items():
            change = "{:>+8.3f} against {} [{:+.3f}, {:+.3f}]"
            change = change.format(c["difference"], printable(first), *c["interval"])
            comparisons.append((model, name, change + (_p_value(c["p"]) if "p" in c else "")))
        for kind, s in report["scores"].items():
            cells = ["{:.3f} [{:.2f}, {:.2f}]".format(s[name], *s["intervals"][name]) for name in means]
            rows.append((model, kind, f"{s['questions']:>5}", *cells, f"{s['ece']:>6.3f}"))
        for name, value in report.items():
            if isinstance(value, float):  # of the pairs, of We-Math, of the judge
                rows.append((model, name, f"{value:>14.3f}"))
        for b in report["reliability"]:
            bin_name = f"confidence ({b['above']:.1f}, {b['upto']:.1f}]"
            found = f"mean {b['confidence']:.3f}, right {b['right']:.3f}"
            rows.append((model, bin_name, f"{b['share']:>8.3f} of the questions, {found}"))
    rows = [(printable(model), printable(name), *cells) for model, name, *cells in comparisons + rows]
    models, names = (max(len(row[i]) for row in rows) for i in (0, 1))  # no two look the same cut off
    return "\n".join(" ".join([f"{row[0]:<{models}} {row[1]:<{names}}", *row[2:]]) for row in rows)


def _p_value(p: float) -> str:
    return ", McNemar p < 0.0001" if p < 1e-4 else f", McNemar p = {p:.4f}"
