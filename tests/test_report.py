"""The report: complete for a whole run, honest for half a one, safe for hostile text, and drawn by a real browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
from checkpoints import noise_image

import report
from curate import Example, write_examples

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<script>alert(1)</script> & "quotes" </div>'


def step(phase, k, i):
    common = dict(
        iteration=k,
        phase=phase,
        step=i,
        reward=0.5 + 0.01 * i,
        kl=0.001 * i,
        validity=1.0,
        confidence=0.6,
        seconds=2.0,
    )
    return common | (
        dict(r_unc=0.7 - 0.1 * k, r_div=0.2, clusters=6.0, largest_cluster=0.1, kind_entropy=0.9)
        if phase == "questioner"
        else {}
    )


def make_run(folder, iterations=2, truth=True):
    """A run folder as loop.py would leave it, written by hand."""
    from toy.scenes import write_scenes

    folder.mkdir(parents=True)
    paths = write_scenes(folder / "images", 3, 0) if truth else [folder / "b\udcffd.png", folder / "gone.png"]
    if not truth:
        noise_image(300, 200).save(paths[0])
    config = dict(
        model=None,
        images=None if truth else "photos",
        iterations=iterations,
        tau_low=0.25,
        tau_high=0.75,
        seed=0,
    )
    (folder / "config.json").write_text(json.dumps(config))
    records = [
        dict(
            iteration=0,
            phase="measure",
            **(dict(greedy_accuracy=0.3, sampled_accuracy=0.5, silver_accuracy=None) if truth else {}),
        )
    ]
    for k in range(1, iterations + 1):
        records += [step("questioner", k, i) for i in range(1, 4)]
        questions = [f"How many discs are there?{'' if truth else EVIL}", f"Is it {EVIL}?"]
        examples = [
            Example(str(p), q, "numerical", "1", 0.5, ["1", "1.0", None, EVIL])
            for p in paths
            for q in questions
        ]
        write_examples(
            folder / "candidates" / f"iteration-{k}.jsonl",
            [*examples, Example(str(paths[0]), "?", "numerical", None, 0.0, [None] * 4)],
        )
        records.append(dict(iteration=k, phase="curation", curated=4 * k, confidence=0.6, seconds=3.0))
        records.append(dict(iteration=k, phase="warning", signature="question collapse", message=EVIL))
        records += [step("reasoner", k, i) for i in range(1, 3)]
        measured = dict(greedy_accuracy=0.5, sampled_accuracy=0.6, silver_accuracy=0.8) if truth else {}
        records.append(
            dict(iteration=k, phase="measure", base_agreement=0.9, probe_confidence=0.7, **measured)
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "skipped.txt").write_text(f"a.png\t{EVIL}\n")
    return folder


def written(folder):
    assert report.main([str(folder)]) == 0
    return (folder / "report.html").read_text()


def check_page(text):
    """Self-contained, small, with a text for each picture, and nothing of what a model wrote is markup."""
    assert len(text) < 3_000_000 and "<script" not in text and EVIL not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and not re.search(r"https?://|url\(|@import", text)
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", text))
    assert all('role="img"' in tag and 'aria-label="' in tag for tag in re.findall(r"<svg[^>]*>", text))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_a_whole_run(tmp_path):
    text = written(make_run(tmp_path / "run"))
    check_page(text)
    assert (
        "complete, 2 iterations" in text
        and "Share that is right" in text
        and text.count("Difficulty, iteration") == 4
    ), "title and text"
    assert text.count("data:image/jpeg") == 3 and "Iteration 2" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "right</span>" in text or "wrong, it is" in text, "the truth of built-in scenes is known"
    assert "1 images skipped" in text and "question collapse" in text


def test_votes_are_counted_as_the_reasoner_counts_them(tmp_path):
    """1 and 1.0 are one answer, what could not be parsed is another; with true label 1 the verdict is right."""
    card = report.question_card(Example("x", "?", "numerical", "1", 0.5, ["1", "1.0", None, "2"]), True, "1")
    bars = re.findall(
        r'<span title="([^"]*)">.*?<div class="(bar[^"]*)" style="width: (\d+)%"></div><span>(\d)</span>',
        card,
    )
    assert bars == [("1", "bar label", "50", "2"), ("no answer", "bar", "25", "1"), ("2", "bar", "25", "1")]
    assert "✓ right" in card and "kept" in card and "confidence 0.50" in card
    assert "✗ wrong, it is 3" in report.question_card(
        Example("x", "?", "numerical", "1", 1.0, ["1"]), False, "3"
    )
    assert "right" not in report.question_card(Example("x", "?", "numerical", "1", 1.0, ["1"]), False, None)


def test_your_own_images_have_no_truth(tmp_path):
    text = written(make_run(tmp_path / "run", truth=False))
    check_page(text)
    assert "Share that is right" not in text and "✓" not in text and "can no longer be read" in text
    assert r"b\udcffd.png" in text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "candidates", "skipped.txt", "half"])
def test_a_run_that_is_still_going_on(tmp_path, missing):
    folder = make_run(tmp_path / "run", iterations=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"iterations": 3}))
    if missing == "half":
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"iteration": 2, "phase": "quest')
        (folder / "candidates" / "iteration-2.jsonl").write_text('{"image": "x", "que')
    elif missing == "candidates":
        shutil.rmtree(folder / missing)
    else:
        (folder / missing).unlink()
    text = written(folder)
    check_page(text)
    assert ("0 of 3" if missing == "metrics.jsonl" else "1 of 3") + " iterations complete" in text
    assert ("Nothing to draw yet" in text) == (missing == "metrics.jsonl")
    assert ("No questions have been curated yet" in text) == (missing == "candidates")


def test_what_is_no_run_gets_one_sentence(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert report.main([str(folder)]) == 2
        err = capsys.readouterr().err
        assert "not the folder of a run" in err and err.count("\n") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("window", [390, 1200])
def test_a_browser_draws_every_figure(tmp_path, window):
    """Each figure's marks have a size on the screen and lie in their figure; nothing is wider than the window; the console is silent.

    The page is in a frame of that width: the browser's own window is never narrower than 500 pixels.
    """
    page = tmp_path / "run" / "report.html"
    text = written(make_run(tmp_path / "run"))
    look = """<script>window.onload = () => { const told = [];
      for (const svg of document.querySelectorAll("svg")) { const all = svg.getBoundingClientRect(); let marks = 0, out = 0;
        for (const mark of svg.querySelectorAll(".curve, circle, rect:not(.band)")) { const box = mark.getBoundingClientRect();
          if (box.width + box.height > 2) marks++;
          if (box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1) out++; }
        for (const word of svg.querySelectorAll("text")) if (word.getBoundingClientRect().left < all.left - 1) out++;
        told.push([svg.getAttribute("aria-label"), marks, out]); }
      const images = [...document.images].filter(i => i.naturalWidth == 0).length;
      parent.postMessage(JSON.stringify([told, images, document.documentElement.scrollWidth, innerWidth]), "*"); }</script>"""
    page.write_text(text.replace("</body>", look + "</body>"))
    host = page.with_name("host.html")
    listen = "<script>onmessage = event => { const told = document.createElement('pre'); told.textContent = event.data; told.id = 'told'; document.body.append(told); }</script>"
    host.write_text(
        f"<!DOCTYPE html><body>{listen}<iframe src='report.html' width='{window}' height='3000' style='border: 0'></iframe></body>"
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [
        CHROMIUM,
        *flags.split(),
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--window-size=1300,3000", "--virtual-time-budget=3000", "--dump-dom", host.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    figures, broken_images, width, inner = json.loads(
        html.unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    )
    assert len(figures) == text.count("<svg") >= 12 and broken_images == 0 and width <= inner == window
    assert all(marks > 0 and out == 0 for _, marks, out in figures), figures
    assert "CONSOLE" not in done.stderr, done.stderr
