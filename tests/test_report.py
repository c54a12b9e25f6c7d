"""The report says what happened, is whole for a whole run, honest for half a one and safe for hostile text.

A real browser draws it.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from checkpoints import noise_image

import report
from curate import VotedQuestion
from measure import charts
from training.folder import write_examples
from training.log import table_row
from training.scenes import read_truth, write_scenes

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
EVIL = '<script>alert(1)</script> & "quotes" </div>'
QUESTIONS = ("How many discs are there?", f"Is it {EVIL}?", "?")  # those before the last are kept


def step(phase, k, i, r_unc=None):
    record = dict(
        iteration=k, phase=phase, step=i, reward=0.5 + 0.01 * i, kl=0.001 * i, validity=1.0
    )
    record |= dict(confidence=0.6, seconds=2.0)
    if phase == "questioner":
        record |= dict(r_unc=0.7 - 0.1 * k if r_unc is None else r_unc, r_div=0.2, clusters=6.0)
        record |= dict(largest_cluster=0.1, kind_entropy=0.9)
    return record


def rungs(*values):
    return dict(zip(("1-2", "3-4", "5-6", "7-9"), values))


def measured(k, ladder):
    """What the built-in world is measured by after iteration k."""
    record = dict(greedy_accuracy=0.5, sampled_accuracy=0.6, silver_accuracy=0.8 if k else None)
    if ladder:
        record["sampled_by_objects"] = rungs(
            0.95, 0.7 + 0.04 * k, 0.3 + 0.1 * k, None if k == 1 else 0.05
        )
        record["greedy_by_objects"] = rungs(1, 0.9, 0.2 + 0.1 * k, 0.0)
        record["silver_by_objects"] = rungs(None, 0.9, 0.7, 0.4) if k else None
        record["objects"] = 3.5 + k if k else None
    return record


def make_run(folder, iterations=2, truth=True, ladder=False):
    """A run folder as loop.py would leave it, written by hand."""
    folder.mkdir(parents=True)
    paths = (
        write_scenes(folder / "images", 3, 0)
        if truth
        else [folder / "b\udcffd.png", folder / "gone.png"]
    )
    if not truth:
        noise_image(300, 200).save(paths[0])
    config = dict(model=None, images=None if truth else "photos", iterations=iterations, seed=0)
    (folder / "config.json").write_text(json.dumps(config | dict(tau_low=0.25, tau_high=0.75)))
    records = [dict(iteration=0, phase="measure") | (measured(0, ladder) if truth else {})]
    for k in range(1, iterations + 1):
        records += [step("questioner", k, i) for i in range(1, 4)]
        votes = dict(kind="numerical", label="1", confidence=0.5, answers=["1", "1.0", None, EVIL])
        asked = [
            VotedQuestion(str(path), question, **votes) for path in paths for question in QUESTIONS
        ]
        write_examples(folder / "candidates" / f"iteration-{k}.jsonl", asked)
        kept = [e for e in asked if e.question != QUESTIONS[-1]]
        write_examples(folder / "curated" / f"iteration-{k}.jsonl", kept)
        records.append(
            dict(iteration=k, phase="curation", curated=len(kept), confidence=0.6, seconds=3.0)
        )
        records.append(
            dict(iteration=k, phase="warning", signature="question collapse", message=EVIL)
        )
        records += [step("reasoner", k, i) for i in range(1, 3)]
        records.append(dict(iteration=k, phase="measure", base_agreement=0.9, probe_confidence=0.7))
        records[-1] |= measured(k, ladder) if truth else {}
    write_records(folder, records)
    (folder / "skipped.txt").write_text(f"a.png\t{EVIL}\n")
    return folder


def write_records(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def change(path, change_one):
    """Rewrites a file of questions: each becomes change_one(question), None leaves it out."""
    changed = [change_one(example) for example in report.read_examples(path)]
    write_examples(path, [example for example in changed if example is not None])


def written(folder):
    assert report.main([str(folder)]) == 0
    return (folder / "report.html").read_text()


def curves(text, title):
    """Name -> how many discs each curve of a figure has; and all that the figure says in words."""
    (figure,) = re.findall(
        rf"<figure><figcaption>{re.escape(html.escape(title))}<.*?</figure>", text
    )
    words = html.unescape(re.search(r'aria-label="([^"]*)"', figure)[1])
    names = re.findall(r"</i>([^<]*)</span>", figure) or [""]
    discs = {n: len(re.findall(rf"<circle[^>]*--c{i}\)", figure)) for i, n in enumerate(names)}
    return discs, words, figure


def check_page(text):
    """Self-contained, small, with a text for each picture, and nothing of what a model wrote is markup."""
    assert len(text) < 3_000_000 and "<script" not in text and EVIL not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and not re.search(
        r"https?://|url\(|@import", text
    )
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", text))
    assert all(
        'role="img"' in tag and 'aria-label="' in tag for tag in re.findall(r"<svg[^>]*>", text)
    )
    assert "color-scheme: light dark" in text and 'name="viewport"' in text
    for part in ("figure", "div", "span", "details", "p", "svg"):
        assert len(re.findall(rf"<{part}[ >]", text)) == text.count(f"</{part}>"), part


def test_a_whole_run(tmp_path):
    text = written(make_run(tmp_path / "run"))
    check_page(text)
    assert "iterations complete: 2 of 2" in text and "Share that is right" in text
    assert text.count("<figcaption>Difficulty, iteration") == 2
    assert text.count("data:image/jpeg") == 3 and "Iteration 2" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "right</span>" in text or "wrong, it is" in text, "the truth of built-in scenes is known"
    assert "<summary>Images skipped: 1</summary>" in text and "question collapse" in text


def test_a_merged_bar_names_the_spellings_it_holds():
    votes = ["5", "5 cm", "5", "5cm", "x = 5", None, "..."]
    card = report.question_card(
        VotedQuestion("x", "?", "numerical", "5 cm", 5 / 7, votes), True, None
    )
    bars = re.findall(r'title="([^"]*)">.*?<div class="(bar[^"]*)".*?<span>(\d)</span>', card)
    assert bars == [
        ("5 cm = 5 (2) = x = 5 (1)", "bar label", "5"), ("no answer", "bar", "1"), ("...", "bar", "1")
    ]  # fmt: skip
    older = report.question_card(
        VotedQuestion("x", "?", "numerical", "5", 2 / 7, votes), True, None
    )
    assert 'class="bar label"' in older, "a label as it was written before votes were merged"


def test_votes_are_counted_as_the_reasoner_counts_them(tmp_path):
    """1 and 1.0 are one answer, what could not be parsed is another; the true label is said to be right."""
    write_scenes(tmp_path, 60, 0)
    scenes = read_truth(tmp_path).values()
    facts = {report.understand("How many discs are there?", scene) for scene in scenes}
    one, three = (next(fact for fact in facts if fact.answer == answer) for answer in "13")
    example = VotedQuestion("x", "?", "numerical", "1", 0.5, ["1", "1.0", None, "2"])
    card = report.question_card(example, True, one)
    pattern = r'<span title="([^"]*)">.*?<div class="(bar[^"]*)"'
    pattern += r' style="width: (\d+)%"></div><span>(\d)</span>'
    bars = re.findall(pattern, card)
    assert bars == [
        ("1", "bar label", "50", "2"),
        ("no answer", "bar", "25", "1"),
        ("2", "bar", "25", "1"),
    ]
    assert (
        "✓ right" in card
        and "confidence 0.50" in card
        and " · kept" in card
        and "1 to list" in card
    )
    card = report.question_card(replace(example, confidence=1.0, answers=["1"]), False, three)
    assert "✗ wrong, it is 3" in card and "not kept" in card and "3 to list" in card
    assert "right" not in report.question_card(example, False, None)
    nothing = report.question_card(
        replace(example, label=None, answers=[None, "no answer"]), False, one
    )
    assert "silver label none" in nothing and "✗" not in nothing and "bar label" not in nothing
    assert nothing.count('class="vote"') == 2, (
        "an answer that reads so is not one that could not be parsed"
    )


def test_kept_is_what_stands_in_curated(tmp_path):
    """Whatever the rule was: questions within the thresholds were not kept, and some outside of them were."""
    folder = make_run(tmp_path / "run", iterations=1)
    path = folder / "candidates" / "iteration-1.jsonl"
    change(path, lambda e: replace(e, confidence=0.95 if e.question == QUESTIONS[0] else 0.5))
    curated = folder / "curated" / "iteration-1.jsonl"
    change(curated, lambda e: replace(e, confidence=0.95) if e.question == QUESTIONS[0] else None)
    text = written(folder)
    check_page(text)
    kept = re.findall(r"confidence (\S+) · (kept|not kept)", text)
    assert sorted(set(kept)) == [("0.50", "not kept"), ("0.95", "kept")] and len(kept) == 6
    _, words, figure = curves(text, "Difficulty, iteration 1")
    assert "different questions: 9, kept: 3" in words
    bars = re.findall(r'<rect x="(\S+)" .*?height="(\S+)" style="fill: var\(--(\w+)\)', figure)
    assert [colour for _, _, colour in bars] == ["pale", "pale", "c0"], (
        "all at 0.5, all at 1, those kept"
    )
    assert bars[1][:2] == bars[2][:2], "all of those at 1 were kept"


def test_a_question_proposed_twice_is_there_once_with_the_votes_it_was_kept_with(tmp_path):
    folder = make_run(tmp_path / "run", iterations=1)
    path = folder / "candidates" / "iteration-1.jsonl"
    examples = report.read_examples(path)
    write_examples(path, [*examples, *(replace(e, confidence=1.0) for e in examples)])
    change(
        folder / "curated" / "iteration-1.jsonl",
        lambda e: replace(e, confidence=0.75, answers=["1"] * 20),
    )
    text = written(folder)
    assert "different questions: 9, kept: 6" in curves(text, "Difficulty, iteration 1")[1]
    assert text.count("confidence 0.75 · kept") == 6 and text.count("<span>20</span>") == 6


def test_an_older_run_knows_only_what_was_kept(tmp_path):
    folder = make_run(tmp_path / "run")
    shutil.rmtree(folder / "candidates")
    text = written(folder)
    check_page(text)
    assert "different questions: 6, kept: 6" in text and "not kept</div>" not in text


@pytest.mark.parametrize("recorded", ["runs/x/{}", "/home/a/runs/x/{}", r"C:\runs\x\{}", "{}"])
def test_a_run_that_was_moved_shows_its_pictures(tmp_path, monkeypatch, recorded):
    """Its own, even where another run lies now at the place that was recorded."""
    monkeypatch.chdir(tmp_path)
    folder, other = make_run(tmp_path / "moved"), tmp_path / "runs" / "x" / "images"
    other.mkdir(parents=True)
    for path in folder.glob("c*/iteration-*.jsonl"):
        for number in range(3):
            name = f"scene-{number:05d}.png"
            noise_image(300, 200).save(other / name)
            place = recorded.format(
                f"images/{name}".replace("/", "\\" if "\\" in recorded else "/")
            )
            change(
                path, lambda e, n=name, p=place: replace(e, image=p) if e.image.endswith(n) else e
            )
    text = written(folder)
    check_page(text)
    for number in range(3):
        picture = folder / "images" / f"scene-{number:05d}.png"
        assert report.thumbnail(str(picture)) in text
        assert f"{picture.name}, an image of the run" in text
    assert "right</span>" in text or "wrong, it is" in text, "the truth moves with its run"


def test_pictures_outside_of_the_run_folder_are_found_where_they_were(tmp_path):
    folder = make_run(tmp_path / "run", truth=False)
    photos = tmp_path / "photos" / "images"
    photos.mkdir(parents=True)
    noise_image(300, 200).save(photos / "a.png")
    for path in folder.glob("c*/iteration-*.jsonl"):
        change(path, lambda e: replace(e, image=str(photos / "a.png")) if "gone" in e.image else e)
    assert report.thumbnail(str(photos / "a.png")) in written(folder)
    assert report.find_picture(folder, "no/such.png") == "no/such.png"
    assert report.find_picture(folder, "x" * 5000 + "/\0") == "x" * 5000 + "/\0"


def test_your_own_images_have_no_truth(tmp_path):
    text = written(make_run(tmp_path / "run", truth=False))
    check_page(text)
    assert "Share that is right" not in text and "✓" not in text and "to list" not in text
    assert r"b\udcffd.png" in text and text.count("gone.png can no longer be read") == 1


def test_the_console_shows_means_of_a_phase_s_first_and_last_third():
    values = [
        (0.1, 1.0, 8.0),
        (0.3, 1.0, 8.0),
        *[(0.9, 0.5, 1.0)] * 3,
        (0.8, 0.8, 5.0),
        (0.2, 1.0, 6.0),
    ]
    steps = [dict(phase="questioner", r_unc=u, validity=v, clusters=c) for u, v, c in values]
    shown = lambda records: table_row(2, {}, records).split("|")[1].split()  # noqa: E731
    assert shown(steps) == ["0.900", "0.200", "-", "0.500", "5.5"], (
        "of 7 steps the first two and the last two"
    )
    assert shown(steps[:1]) == ["1.000", "0.100", "-", "0.100", "8.0"]
    assert shown([]) == ["-"] * 5


def test_r_unc_is_the_mean_of_a_phase_s_first_and_last_third(tmp_path):
    """Phases of six steps, whose last step falls; and one of two steps, of which one has no number."""
    folder = make_run(tmp_path / "run")
    phases = {1: [0.2, 0.4, 0, 0, 0.9, 0.5], 2: [0.1, 0.3, 0, 0, 0.8, 0.6], 3: [0.4, "no"]}
    records = [
        step("questioner", k, i, r)
        for k, phase in phases.items()
        for i, r in enumerate(phase, start=1)
    ]
    write_records(folder, records)
    points = [(i, r["r_unc"]) for i, r in enumerate(records, start=1) if r["r_unc"] != "no"]
    found = charts.thirds(points, [7, 13])
    assert [place for place, _ in found] == [1, 6, 7, 12, 13]
    assert [value for _, value in found] == pytest.approx([0.3, 0.7, 0.2, 0.7, 0.4])
    title = "Difficulty r_unc, first and last third of a phase"
    discs, words, figure = curves(written(folder), title)
    assert discs == {"": 5} and words == f"{title}: r_unc from 0.3 to 0.4"
    assert figure.count('class="dashed"') == 2 and figure.count("<polyline") == 3, (
        "each phase by itself"
    )


def test_the_ladder(tmp_path):
    """A curve for each rung from the base on, and curated questions on the rungs, without what is null."""
    text = written(make_run(tmp_path / "run", iterations=3, ladder=True))
    check_page(text)
    discs, words, _ = curves(text, "Accuracy by rung")
    assert discs == {"1-2 objects": 4, "3-4 objects": 4, "5-6 objects": 4, "7-9 objects": 3}
    assert "5-6 objects from 0.3 to 0.6" in words and "7-9 objects from 0.05 to 0.05" in words
    discs, _, _ = curves(text, "Silver labels that are right, by rung")
    assert discs == {"1-2 objects": 0, "3-4 objects": 3, "5-6 objects": 3, "7-9 objects": 3}
    discs, words, figure = curves(text, "Where curated questions stand")
    assert discs == {"": 3} and "from 4.5 to 6.5" in words
    assert re.findall(r">(\d-\d)</text>", figure) == ["1-2", "3-4", "5-6", "7-9"]
    # From 150 up to 10 for 0.5 to 9.5 objects: 4.5 and 6.5 are borders of two rungs, 5.5 is inside of one.
    borders = [round(150 - 140 * (objects - 0.5) / 9, 1) for objects in (4.5, 5.5, 6.5)]
    assert [float(y) for y in re.findall(r'<circle cx="\S+" cy="(\S+)"', figure)] == borders
    assert [float(y) for y in re.findall(r"H350V(\S+)H52", figure)][1:3] == [borders[0], borders[2]]


@pytest.mark.parametrize("half", [None, {}, rungs(None, None, None, None), "x", {"many": 0.5}])
def test_a_ladder_with_holes(tmp_path, half):
    folder = make_run(tmp_path / "run", ladder=True)
    records = report.read_records(folder)
    write_records(
        folder, [r | ({"sampled_by_objects": half} if r.get("iteration") else {}) for r in records]
    )
    text = written(folder)
    check_page(text)
    assert curves(text, "Accuracy by rung")[0]["5-6 objects"] == 1, "that of the base"
    write_records(
        folder, [r | {name: half for name in r if name.endswith("_by_objects")} for r in records]
    )
    text = written(folder)
    check_page(text)
    assert ("The ladder" in text) == (half == {"many": 0.5})


@pytest.mark.parametrize("truth", [True, False])
def test_no_ladder_without_its_records(tmp_path, truth):
    text = written(make_run(tmp_path / "run", truth=truth))
    assert "ladder" not in text and "rung" not in text.partition("<body>")[2]


def test_the_gallery_shows_how_questions_climb(tmp_path):
    """One image's questions of iterations 1, 2, 3 side by side, with the objects that each asks for."""
    folder = make_run(tmp_path / "run", iterations=3)
    scene = read_truth(folder / "images")["scene-00000.png"]
    asked = (
        "Does it show a red disc, yes or no?",
        "How many discs are there?",
        "How many red shapes are there?",
    )
    for k, question in enumerate(asked, start=1):
        for kind in ("candidates", "curated"):
            change(
                folder / kind / f"iteration-{k}.jsonl", lambda e, q=question: replace(e, question=q)
            )
    card = written(folder).split('<div class="image">')[1]
    turns = re.findall(
        r"<h3>Iteration (\d)</h3><div class=\"question\"><div>(.*?)</div>.*?(\d) to list", card
    )
    assert turns == [
        (str(k), question, str(len(report.understand(question, scene).things)))
        for k, question in enumerate(asked, start=1)
    ]


@pytest.mark.parametrize("missing", ["metrics.jsonl", "curated", "skipped.txt", "half"])
def test_a_run_that_is_still_going_on(tmp_path, missing):
    folder = make_run(tmp_path / "run", iterations=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"iterations": 3}))
    if missing == "half":
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"iteration": 2, "phase": "quest')
        shutil.copy(
            folder / "candidates" / "iteration-1.jsonl", folder / "candidates" / "iteration-2.jsonl"
        )
        (folder / "curated" / "iteration-2.jsonl").write_text('{"image": "x", "que')
    elif missing == "curated":
        shutil.rmtree(folder / missing)
    else:
        (folder / missing).unlink()
    text = written(folder)
    check_page(text)
    assert f"iterations complete: {0 if missing == 'metrics.jsonl' else 1} of 3" in text
    assert ("Nothing to draw yet" in text) == (missing == "metrics.jsonl")
    assert ("No questions have been curated yet" in text) == (missing == "curated")
    assert "Iteration 2" not in text


def test_what_is_no_run_gets_one_sentence(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert report.main([str(folder)]) == 2
        err = capsys.readouterr().err
        assert "not the folder of a run" in err and err.count("\n") == 1


def test_the_page_does_not_go_over_the_run(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("config.json", "metrics.jsonl"):
        with pytest.raises(SystemExit) as stop:
            report.main([str(folder), "--out", str(folder / name)])
        assert stop.value.code == 2 and "a file of the run itself" in capsys.readouterr().err
    assert report.main([str(folder)]) == report.main([str(folder)]) == 0, (
        "over an older page it does"
    )
    assert {path: path.read_bytes() for path in before} == before


LOOK = """<script>window.onload = () => {
  const told = [], box = mark => mark.getBoundingClientRect();
  const beside = (a, b) => a.left < b.left - 1 || a.right > b.right + 1;
  const outside = (a, b) => beside(a, b) || a.top < b.top - 1 || a.bottom > b.bottom + 1;
  const over = (a, b) => a.left < b.right && b.left < a.right && a.top + 4 < b.bottom && b.top + 4 < a.bottom;
  for (const svg of document.querySelectorAll("svg")) {
    const all = box(svg); let marks = 0, out = 0;
    for (const mark of svg.querySelectorAll(".curve, .band, circle, rect")) {
      if (box(mark).width + box(mark).height > 2 && !mark.matches(".band")) marks++;
      if (outside(box(mark), all)) out++;
    }
    const words = [...svg.querySelectorAll("text")].map(box);
    for (const a of words)
      if (outside(a, all) || words.some(b => a !== b && over(a, b))) out++;
    told.push([svg.getAttribute("aria-label"), marks, out]);
  }
  const broken = [...document.images].filter(image => image.naturalWidth == 0).length;
  parent.postMessage(JSON.stringify([told, broken, document.documentElement.scrollWidth, innerWidth]), "*");
}</script>"""
HOST = """<!DOCTYPE html><body><script>onmessage = event => {
  const told = document.createElement("pre");
  told.id = "told"; told.textContent = event.data; document.body.append(told);
}</script><iframe src="report.html" width="{window}" height="3000" style="border: 0"></iframe></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("window", [390, 1200])
def test_a_browser_draws_every_figure(tmp_path, window):
    """Each figure's marks have a size and lie in it, no words overlap, nothing is wider than the window.

    The page is in a frame of that width: the browser's own window is never narrower than 500 pixels.
    """
    page = tmp_path / "run" / "report.html"
    text = written(make_run(tmp_path / "run", iterations=3, ladder=True))
    page.write_text(text.replace("</body>", LOOK + "</body>"))
    host = page.with_name("host.html")
    host.write_text(HOST.replace("{window}", str(window)))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking"
    flags += (
        " --disable-component-update --disable-sync --enable-logging=stderr --window-size=1300,3000"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", host.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)[1]
    figures, broken_images, width, inner = json.loads(html.unescape(told))
    assert (
        len(figures) == text.count("<svg") >= 12 and broken_images == 0 and width <= inner == window
    )
    assert all(marks > 0 and out == 0 for _, marks, out in figures), figures
    assert "CONSOLE" not in done.stderr, done.stderr
