"""The reports of evaluate.py as text."""

from engine.records import printable


def table(reports: dict[str, dict]) -> str:
    """The comparisons with the first model, then the scores of all models side by side."""
    means = list(next(iter(reports.values()))["scores"]["all"]["intervals"])
    heads = [f"{name.removesuffix('_accuracy'):>18}" for name in means]
    comparisons, lines = [], [_row("model", "kind", f"{'n':>5}", *heads, f"{'ece':>6}")]
    for model, report in reports.items():
        for name, c in report.get("against_first", {}).items():
            change = "{:>+8.3f} against the first [{:+.3f}, {:+.3f}]".format(c["difference"], *c["interval"])
            comparisons.append(_row(model, name, change + (_p_value(c["p"]) if "p" in c else "")))
        for kind, s in report["scores"].items():
            cells = ["{:.3f} [{:.2f}, {:.2f}]".format(s[name], *s["intervals"][name]) for name in means]
            lines.append(_row(model, kind, f"{s['questions']:>5}", *cells, f"{s['ece']:>6.3f}"))
        for name, value in report.items():
            if isinstance(value, float):  # of the pairs, of We-Math, of the judge
                lines.append(_row(model, name, f"{value:>14.3f}"))
        for b in report["reliability"]:
            bin_name = f"confidence ({b['above']:.1f}, {b['upto']:.1f}]"
            found = f"mean {b['confidence']:.3f}, right {b['right']:.3f}"
            lines.append(_row(model, bin_name, f"{b['share']:>8.3f} of the questions, {found}"))
    return "\n".join(comparisons + lines)


def _row(model: str, name: str, *cells: str) -> str:
    return " ".join([f"{printable(model)[-24:]:<24} {printable(name)[:24]:<24}", *cells])


def _p_value(p: float) -> str:
    return ", McNemar p < 0.0001" if p < 1e-4 else f", McNemar p = {p:.4f}"
