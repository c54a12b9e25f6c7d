"""The page that report.py fills in: its style, and its parts in order."""

from collections.abc import Sequence

from measure.charts import escape

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 18%, Canvas);
  --c0: #2f7dc2; --c1: #c85a14; --c2: #23864f; --c3: #9457ae; --c4: #a8871a; --c5: #61717f;
  --pale: color-mix(in srgb, #2f7dc2 35%, Canvas); }
* { box-sizing: border-box; min-width: 0; overflow-wrap: anywhere; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; }
h3, .soft, .key { margin: 0; font-size: .9rem; color: color-mix(in srgb, CanvasText 70%, Canvas); }
p, p.soft { max-width: 46rem; margin: .5rem 0 .8rem; }
.trouble { border: 1px solid var(--line); border-left: 4px solid var(--c1); border-radius: 8px;
  padding: .2rem .8rem; margin: .8rem 0; max-width: 60rem; }
.trouble h2 { font-size: 1.1rem; margin: .5rem 0 0; } .trouble ul { margin: .4rem 0; padding-left: 1.2rem; }
pre { white-space: pre-wrap; font-size: .8rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure, .image { margin: 0; padding: .7rem; border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-weight: 600; } svg { width: 100%; display: block; }
svg text { fill: CanvasText; opacity: .7; font-size: 11px; }
.axis { stroke: var(--line); fill: none; } .dashed { stroke: CanvasText; opacity: .4; stroke-dasharray: 3; }
.curve { fill: none; stroke-width: 2; }
.band { opacity: .15; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .9rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left;
  overflow-wrap: break-word; }
.key { margin-right: .9rem; display: inline-block; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
.image { margin-bottom: 1rem; display: grid; gap: 1rem; grid-template-columns: 168px 1fr; }
img { width: 168px; }
@media (max-width: 45rem) { .image { grid-template-columns: 1fr; } }
.turns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
.question { border-top: 1px solid var(--line); padding: .5rem 0; }
.vote { display: grid; gap: .4rem; grid-template-columns: 5.5rem 1fr 1.6rem; font-size: .85rem; }
.vote span:first-child { text-align: right; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar { height: .7rem; margin-top: .3rem; background: var(--pale); } .bar.label { background: var(--c0); }
.sample { padding: .2rem 0 .6rem 1rem; display: grid; gap: 1rem; grid-template-columns: 168px 1fr; }
.output { border-top: 1px solid var(--line); padding: .3rem 0; } .output pre { margin: .2rem 0; }
@media (max-width: 45rem) { .sample { grid-template-columns: 1fr; padding-left: 0; } }
summary { cursor: pointer; } .sample h3 { margin-top: .8rem; }
.good { color: var(--c2); } .bad { color: var(--c1); }
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}, a VisPlay run</title>
<meta name="viewport" content="width=device-width, initial-scale=1">{reload}
<style>{style}</style></head><body>
<h1>{name}</h1><p>{state}</p>
{troubles}
<details><summary>All settings</summary><pre>{settings}</pre></details>
<details><summary>Images skipped: {skips}</summary><pre>{skipped}</pre></details>
{ladder}
<h2>Curves</h2>
<p class="soft">A dashed line marks a new iteration. r_unc = 1 - |2c - 1| is highest when half of the answers
agree; the confidence c is the share of the majority. In the histograms the questions that curation kept are
coloured.</p>
<div class="charts">{charts}</div>
<h2>Questions and votes</h2>
<p class="soft">Each bar is an answer and how often the Reasoner gave it. The coloured one is the majority,
the silver label. Questions that were kept come first. The iterations stand side by side: they show how the
questions about an image get harder, and how sure the Reasoner is of them.</p>
{gallery}
<h2>What the models wrote</h2>
<p class="soft">Whole examples, as the models wrote them. In a Questioner step these are the outputs about one
image: the votes on each valid question, its reward and its advantage. Below them stand two answers of the
Reasoner in full. In a Reasoner step these are the answers to one curated question.</p>
{samples}
</body></html>
"""
COMPARISON = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>VisPlay runs compared</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>
<h1>Runs compared</h1>
<p class="soft">Runs that differ in nothing but the seed are a group. The accuracies are means over the group,
at the end of its runs.</p>
{groups}
{remarks}
<h2>The last accuracies</h2>
<p class="soft">Each group is compared with the first. The interval holds the true difference in 95 of 100
such experiments (Student's t, over the differences of runs with the same seed). Few seeds make it wide.</p>
{tests}
<h2>Settings that differ</h2>
{settings}
<h2>Curves</h2>
<p class="soft">A curve is the mean of a group. Its band reaches from the lowest to the highest run. A dashed
line marks a new iteration.</p>
<div class="charts">{charts}</div>
</body></html>
"""
RELOAD = '<meta http-equiv="refresh" content="30">'
LADDER = """<h2>The ladder</h2>
<p class="soft">A rung is how many objects one must list to answer a question. Accuracy is that of sampled
answers to held-out questions; iteration 0 is the base. The last chart shows the mean number of objects of
the curated questions.</p>
<div class="charts">{charts}</div>"""


def draw_box(title: str, texts: Sequence[str]) -> str:
    """Returns a box that catches the eye, with an item for each text; "" without any."""
    if not texts:
        return ""
    return f'<section class="trouble"><h2>{title}</h2>{draw_list(texts)}</section>'


def draw_list(texts: Sequence[str]) -> str:
    """Returns texts as an HTML list."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>"
