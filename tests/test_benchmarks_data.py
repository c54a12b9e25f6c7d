"""Published benchmarks become lines: hand-made records with the published columns, right and broken ones.

No record of a benchmark was at hand; the columns are those that lmms-eval and VLMEvalKit read.
"""

import io

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import benchmarks
import evaluate
import reasoner
from benchmarks import BENCHMARKS, convert, number_marks, remove_marks, split_choices
from measure.items import Item, parse_item, read_answer, right
from measure.outcomes import Outcome, question_text
from measure.scores import full_report, we_math, we_math_scores


def file_of(colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, kind)
    return buffer.getvalue()


IMAGE = {"bytes": file_of(), "path": None}
OTHER = {"bytes": file_of("blue", "JPEG"), "path": "b.jpg"}
NO_IMAGES = {f"image_{i}": None for i in range(2, 8)}
MMMU = NO_IMAGES | dict(
    id="validation_Art_Theory_7", question="<image 1> Who made what <image 1> shows?",
    options="['Ann', \"Bob's son\", 'C']", answer="B", image_1=IMAGE, question_type="multiple-choice",
    subfield="History", explanation="", img_type="['Sculpture']", topic_difficulty="Easy",
)  # fmt: skip
RECORDS = {
    "mmmu": MMMU,
    "mmmu-pro-4": MMMU | dict(options="['Ann', 'Bob', 'C', 'D']", subject="Art_Theory"),
    "mmmu-pro-10": MMMU | dict(options=str([*"klmnopqrst"]), answer="J"),
    "mmmu-pro-vision": dict(id="test_Art_1", image=IMAGE, options="['a', 'b']", answer="C", subject="Art"),
    "mathvista": dict(
        pid="1", question="How wide?", image="images/1.jpg", decoded_image=IMAGE, choices=None, unit="m",
        precision=1.0, answer="1.2", question_type="free_form", answer_type="float",
        metadata=dict(task="geometry problem solving"),
        query="Hint: one decimal.\nQuestion: How wide? (Unit: m)",
    ),
    "mathverse": dict(
        sample_index="1", problem_index="1", problem_version="Text Lite",
        question="Find x.\nChoices:\nA:65°\nB:55°",
        image=IMAGE, answer="B", question_type="multi-choice", metadata={}, question_for_eval="hidden text",
        query_wo="direct", query_cot="Reason first.\nQuestion: Find x.\nChoices:\nA:65°\nB:55°\nC:1,5",
    ),
    "math-vision": dict(
        id="4", question="How many are left?\n<image1>", options=["1", "2"], image="images/4.jpg", level=1,
        decoded_image=IMAGE, answer="A", solution=None, subject="counting",
    ),
    "we-math": {
        "ID": "17", "split": "testmini", "knowledge concept": "Area", "question": "What is the area?",
        "option": "A. 4; B. 5 cm; C. No correct answer", "answer": "C", "key": "2steps_multi",
        "question number": "2", "knowledge concept description": "", "image_path": IMAGE,
    },
    "mmstar": dict(
        index=0, question="<image 1>Which?\nOptions: A: red, white, B: Grenada, C: Cuba, D: Aruba",
        image=IMAGE,
        answer="A", category="coarse perception", l2_category="style", meta_info={},
    ),
    "hallusionbench": dict(
        category="VD", subcategory="chart", visual_input="1", set_id="0", figure_id="1", sample_note="",
        question_id="2", question="Is it so?", gt_answer_details="It is.", gt_answer="1", filename="x",
        image=IMAGE,
    ),
    "realworldqa": dict(
        image_path="0.webp", image=IMAGE, answer="A",
        question="Where is it?\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct"
        " option and nothing else.",
    ),
    "mm-vet": dict(
        question_id="v1_0", image=IMAGE, question="What is x?", answer="-1 <AND> -5<OR> both",
        image_source="",
        capability="ocr, math",
    ),
    "visnumbench": {
        "class": "angle", "id": 3, "question": "How many degrees?", "option": "(a) 30\n(b) 45\n(c) f(a)",
        "answer": "(b)", "task_class": "angle", "Attributes": "", "image": IMAGE,
    },
}  # fmt: skip
OFFICIAL = dict(problem="<image>How many?", answer="2", images=[IMAGE])


def line(name, **changes):
    """The line of a benchmark's record with other fields, without its image; or the reason."""
    made = convert(BENCHMARKS[name][3], RECORDS[name] | changes)
    if isinstance(made, dict):
        assert made.pop("images") == [IMAGE["bytes"]]
    return made


def item(name, **changes) -> Item:
    return parse_item(line(name, **changes) | dict(image="x"), ROOT)


def is_right(text: str, of: Item) -> bool:
    return right(read_answer(text, of), of)


def test_every_benchmark_has_a_record_here():
    assert set(RECORDS) | {"vision-sr1-47k"} == set(BENCHMARKS)


LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    "name, made",
    [
        ("mmmu", dict(question="Who made what the image shows?", answer="B", kind="Art_Theory",
                      choices=["Ann", "Bob's son", "C"], ending=LETTER)),
        ("mmmu-pro-vision", dict(question="Answer the multiple-choice question in the image.", answer="C",
                                 kind="Art", ending=benchmarks.LAST_LINE)),
        ("mathvista", dict(question="Hint: one decimal.\nQuestion: How wide? (Unit: m)", answer="1.2",
                           kind="geometry problem solving", precision=1)),
        ("mathverse", dict(question="Reason first.\nQuestion: Find x.", answer="B", kind="Text Lite",
                           choices=["65°", "55°", "1,5"])),
        ("math-vision", dict(question="How many are left?", answer="A", choices=["1", "2"], kind="counting",
                             ending=benchmarks.ONE_BOX)),
        ("we-math", dict(question="What is the area?", answer="C", choices=["4", "5 cm", "No correct answer"],
                         kind="2steps_multi", question_id="17")),
        ("mmstar", dict(question="Which?", answer="A", choices=["red, white", "Grenada", "Cuba", "Aruba"],
                        kind="coarse perception", ending=LETTER)),
        ("hallusionbench", dict(question="Is it so?", answer="yes", kind="chart", question_id="VD chart 0 2",
                                figure_id="VD chart 0 1")),
        ("realworldqa", dict(question="Where is it?", answer="A", choices=["Left", "Right"],
                             ending="Please answer directly with only the letter of the correct option and"
                             " nothing else.")),
        ("mm-vet", dict(question="What is x?", answer=["-1 <AND> -5", "both"], kind="ocr,math")),
        ("visnumbench", dict(question="How many degrees?", answer="(b)", choices=["30", "45", "f(a)"],
                             kind="angle")),
    ],
)  # fmt: skip
def test_a_record_becomes_a_line(name, made):
    assert line(name) == made


def test_the_other_forms_of_records():
    assert line("mmmu-pro-10")["choices"] == [*"klmnopqrst"] and is_right("J", item("mmmu-pro-10"))
    open_one = item("mmmu", question_type="open", options="[]", answer="['24/7', '3.429']")
    assert open_one.answer == ("24/7", "3.429") and open_one.ending == benchmarks.WORD
    assert (
        is_right("3.43", open_one)
        and is_right(r"\boxed{24/7}", open_one)
        and not is_right("3", open_one)
    )
    chosen = line(
        "mathvista",
        choices=["x", "y"],
        answer="y",
        precision=None,
        query="Hint.\nQ: ?\nChoices:\n(A) x",
    )
    assert (
        chosen["question"] == "Hint.\nQ: ?"
        and chosen["choices"] == ["x", "y"]
        and "precision" not in chosen
    )
    assert (
        line("mathvista", answer_type="integer", precision=float("nan"), answer="7")["precision"]
        == 0
    )
    assert "precision" not in line("mathvista", answer_type="list", answer="[1, 2]")
    assert line("mathverse", question_type="free-form", answer="14")["question"].endswith("C:1,5")
    in_the_image = item("mathverse", query_cot="According to the image, reason.", answer="D")
    assert not in_the_image.choices and is_right(r"\boxed{D}", in_the_image)
    assert "choices" not in line("math-vision", options=[], answer="12")
    assert is_right(r"\boxed{D}", item("math-vision", options=[*"ABCDE"], answer="D"))
    ending = "Please answer directly with a single word or number."
    open_one = line("realworldqa", question=f"How many?\n{ending}", answer="3")
    assert open_one == dict(question="How many?", answer="3", ending=ending)
    assert line("mm-vet", capability=["rec", "ocr"])["kind"] == "rec,ocr"
    for option in ("['(a) 30', '(b) 45']", ["30", "45"], "(a) 30 (b) 45", "a. 30\nb. 45"):
        assert line("visnumbench", option=option)["choices"] == ["30", "45"]
    assert line("hallusionbench", gt_answer="0")["answer"] == "no"
    boxed = convert(BENCHMARKS["mmstar"][3], RECORDS["mmstar"], boxed=True)
    assert "ending" not in boxed and boxed["choices"]


def test_the_official_records():
    made = convert(benchmarks.official, OFFICIAL)
    assert made == dict(images=[IMAGE["bytes"]], question="How many?", answer="2")
    for images in (IMAGE, [file_of()], file_of()):
        assert convert(benchmarks.official, OFFICIAL | dict(images=images))["images"] == [file_of()]
    boxed = dict(answer=r"\boxed{B}", problem="Which? <image>\nA. x\nB. y", file_name="mathverse")
    made = convert(benchmarks.official, OFFICIAL | boxed)
    assert (
        made["answer"] == "B"
        and made["kind"] == "mathverse"
        and made["question"] == "Which?\nA. x\nB. y"
    )
    assert is_right(r"\boxed{y}", parse_item(made | dict(images=["x"]), ROOT))
    boxed |= dict(problem="Which? <image>\nA. <image>\nB. y", images=[IMAGE, OTHER])
    made = convert(benchmarks.official, OFFICIAL | boxed)
    assert made["images"] == [IMAGE["bytes"], OTHER["bytes"]] and "image" not in made
    assert made["question"] == "Which? <image 1>\nA. <image 2>\nB. y"
    assert is_right(r"\boxed{y}", parse_item(made | dict(images=["x", "y"]), ROOT))


@pytest.mark.parametrize(
    "problem, question",
    [
        ("<image><image>Which is red?", "<image 1><image 2>Which is red?"),
        ("Is <image> like <image>?", "Is <image 1> like <image 2>?"),
        ("Is <image 2> like <image1>?", "Is <image 2> like <image 1>?"),
        ("Which is red?", "Which is red?"),
        ("<image>, <image> and <image>?", "<image 1>, <image 2> and the image?"),
        (
            "<image 1>: what is <image 1>, what <image 3>?",
            "<image 1>: what is <image 1>, what the image?",
        ),
        ("a < b in <image>\n", "a < b in <image 1>"),
    ],
)
def test_the_official_marks_are_numbered(problem, question):
    made = convert(benchmarks.official, OFFICIAL | dict(problem=problem, images=[IMAGE, OTHER]))
    assert made["question"] == question


def test_an_official_record_without_text_or_with_a_picture_that_has_no_bytes():
    for changes, reason in (
        (dict(problem="<image><image>"), "no question"),
        (dict(images=[IMAGE, "x.png"]), "its image has no bytes"),
        (dict(images=[]), "no image"),
    ):
        assert (
            convert(benchmarks.official, OFFICIAL | dict(images=[IMAGE, OTHER]) | changes) == reason
        )


THREE = MMMU | dict(
    question="What links <image 1> to <image 2>, and what is <image 1>?", image_2=OTHER,
    options="['<image 3>', 'none', '<image 7> or <image2>']", answer="A", image_3={"bytes": file_of("green")},
)  # fmt: skip


def test_mmmu_with_several_images():
    """Marks stay, in one form, in question and options; that of an image that is not there is words."""
    made = convert(benchmarks.mmmu, THREE)
    assert made.pop("images") == [IMAGE["bytes"], OTHER["bytes"], file_of("green")]
    assert made == dict(
        question="What links <image 1> to <image 2>, and what is <image 1>?",
        choices=["<image 3>", "none", "the image or <image 2>"],
        answer="A", kind="Art_Theory", ending=LETTER,
    )  # fmt: skip
    three = parse_item(made | dict(images=["x", "y", "z"]), ROOT)
    assert three.marks == ["<image 1>", "<image 2>", "<image 3>"]
    assert question_text(three).split("\n")[1] == "(A) <image 3>"
    assert is_right("(A)", three) and is_right("<image 3>", three) and not is_right("B", three)


def test_mmmu_with_a_gap_in_its_columns():
    """The second of two images may stand in the third column: a prompt calls it <image 2>."""
    gap = THREE | dict(image_2=None, options="['<image 3>', '<image 2>']")
    made = convert(benchmarks.mmmu, gap)
    assert made["images"] == [IMAGE["bytes"], file_of("green")]
    assert made["question"] == "What links <image 1> to the image, and what is <image 1>?"
    assert made["choices"] == ["<image 2>", "the image"]


def test_an_open_question_of_mmmu_with_several_images():
    made = convert(
        benchmarks.mmmu, THREE | dict(question_type="open", options="[]", answer="['x', 'y']")
    )
    assert made["answer"] == ["x", "y"] and len(made["images"]) == 3 and "choices" not in made
    assert convert(benchmarks.mmmu, THREE | dict(question="<image 1> <image 2>")) == "no question"


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("mmmu", dict(image_1=None), "no image"),
        ("mmmu", dict(image_1={"bytes": None, "path": "/etc/passwd"}), "its image has no bytes"),
        ("mmmu", dict(image_2={"bytes": None, "path": "/etc/passwd"}), "its image has no bytes"),
        ("mmstar", dict(image=[IMAGE, OTHER]), "several images"),
        ("mmmu", dict(answer="?"), "its answer is not published"),
        ("mmmu", dict(answer="D"), "the answer is none of the choices"),
        ("mmmu", dict(options="['a', "), "options is no list"),
        ("mmmu", dict(options="__import__('os').system('true')"), "options is no list"),
        ("mmmu", dict(options="[" * 9000), "options is no list"),
        ("mmmu", dict(options="['a', ['b']]"), "options is no list"),
        ("mmmu", dict(options="[None, 'b']"), "options is no list"),
        ("mmmu", dict(options="['a', '']"), "choices is not text or a number"),
        ("mmmu", dict(options=None), "options is no list"),
        ("mmmu", dict(question="<image 1>"), "no question"),
        ("mmmu", dict(question=None), "no question"),
        ("mmmu", dict(question="\ud800?"), "question is no readable text or number: '\\ud800?'"),
        ("mmmu", dict(question_type="open", answer="['a'"), "answer is no list"),
        ("mmmu-pro-vision", dict(answer="K"), "the answer is no letter"),
        ("mmmu-pro-vision", dict(image=[IMAGE, OTHER]), "several images"),
        ("mathvista", dict(answer=None), "no answer"),
        ("mathvista", dict(answer=float("nan")), "no answer"),
        ("mathvista", dict(choices=["x", "y"], answer="zebra"), "the answer is none of the choices"),
        ("mathverse", dict(query_cot=""), "no query_cot"),
        ("math-vision", dict(options="x"), "options is no list"),
        ("we-math", dict(key="4steps_1"), "its key names no step"),
        ("we-math", dict(ID=None), "no ID"),
        ("mmstar", dict(image="0.png"), "its image has no bytes"),
        ("hallusionbench", dict(gt_answer="2"), "its gt_answer is neither 0 nor 1"),
        ("hallusionbench", dict(image=None), "no image"),
        ("realworldqa", dict(question=" "), "no question"),
        ("mm-vet", dict(answer="<OR>"), "answer is not text or a number"),
        ("visnumbench", dict(option="30 or 45"), "option is no list"),
        ("visnumbench", dict(answer="(e)"), "the answer is none of the choices"),
    ],
)  # fmt: skip
def test_a_record_is_left_out_with_a_reason(name, changes, reason):
    assert line(name, **changes) == reason


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*RECORDS]), st.data())
def test_no_field_is_a_traceback(name, data):
    fields = data.draw(st.lists(st.sampled_from([*RECORDS[name]]), min_size=1, max_size=3))
    record = RECORDS[name] | {field: data.draw(anything) for field in fields}
    made = convert(BENCHMARKS[name][3], record)
    if isinstance(made, dict):
        assert parse_item(made | dict(images=["x"] * len(made["images"])), ROOT)
    assert isinstance(convert(BENCHMARKS[name][3], data.draw(anything)), str)


@pytest.mark.parametrize(
    "text, head, choices",
    [
        ("Which?\nOptions: A: Haiti, B: Cuba, C: Vitamin A: x", "Which?", ["Haiti", "Cuba", "Vitamin A: x"]),
        ("In A. and B. of it?\nChoices:\nA:65\nB:55", "In A. and B. of it?", ["65", "55"]),
        ("(A) 1 (B) 2 (C) 3", "", ["1", "2", "3"]),
        ("A. He said: a) no\nB. yes", "", ["He said: a) no", "yes"]),
        ("What is f(a) or f(b)?", "What is f(a) or f(b)?", []),
        ("A. only one", "A. only one", []),
        ("A. B. C.", "A. B. C.", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_choices_are_split_off(text, head, choices):
    assert split_choices(text) == (head, choices)


def test_long_texts_take_no_time():
    for part in ("(a) ", "A. x ", "options: ", "<image 1>", " ", "\t<image>", "A:"):
        split_choices(part * 20_000)
        remove_marks(part * 20_000 + "?")
        number_marks(part * 20_000 + "?", [part * 20_000], range(1, 3))


def test_marks_of_images():
    assert remove_marks("<image 1>\nWhich? <image 2>\nA") == "Which?\nA"
    assert remove_marks("Is <image1> red?") == "Is the image red?"
    assert remove_marks("a < b <image>") == "a < b"


# ---- Scores ----


@pytest.mark.parametrize(
    "answer, truth, precision, same",
    [
        ("1.23", "1.2", 1, True), ("1.26", "1.2", 1, False), ("1.2 m", "1.2", 1, True),
        ("x = 1.2", "1.2", 1, True),
        ("7", "7", 0, True), ("7 apples", "7", 0, True), ("7.9", "7", 0, True), ("8", "7", 0, False),
        ("50%", "50", 0, True), ("1,200", "1200", 0, True), ("-3 cm", "-3", 0, True), ("3", "-3", 0, False),
        (r"\frac{1}{2}", "0.5", 1, True), ("seven", "7", 0, False), ("1/0", "7", 0, False),
        ("0.147", "0.15", 2, True),
        ("9" * 500, "7", 0, False), ("", "7", 0, False),
    ],
)  # fmt: skip
def test_mathvista_numbers(answer, truth, precision, same):
    assert right(answer, Item("x", "?", (truth,), precision=precision)) == same


def test_mathvista_texts_and_lists():
    assert is_right(r"\boxed{[1,2]}", item("mathvista", answer_type="list", answer="[1, 2]"))
    assert is_right(r"\boxed{No}", item("mathvista", answer_type="text", answer="no"))


def test_mm_vet_answers():
    both = item("mm-vet")
    assert is_right(r"\boxed{-5, -1}", both) and is_right(r"\boxed{Both}", both)
    assert not is_right(r"\boxed{-1}", both) and not is_right(r"\boxed{-5, -11}", both)
    assert not is_right(r"\boxed{x}", Item("x", "?", ("<AND>",)))


@pytest.mark.parametrize(
    "text, said",
    [
        ("Reasons.\nAnswer: B", "B"), ("The answer is (B).", "(B)."), ("B", "B"), (r"B or \boxed{C}", "C"),
        ("<think>Answer: A</think>\nThe answer is:\nB", "B"), ("", None), ("<think>B", None), ("7\n\n", "7"),
    ],
)  # fmt: skip
def test_an_ending_without_a_box_is_answered_without_one(text, said):
    assert read_answer(text, Item("x", "?", ("B",), ending="Directly.")) == said
    assert "\\boxed" in text or read_answer(text, Item("x", "?", ("B",))) is None


def test_the_ending_stands_instead_of_the_instruction():
    direct = Item("x", "Which?", ("A",), ("red", "blue"), ending="Directly.")
    assert question_text(direct) == "Which?\n(A) red\n(B) blue\nDirectly."
    assert question_text(Item("x", "?", ("A",))) == "?" + reasoner.INSTRUCTION


@pytest.mark.parametrize("precision", [-1, 1.5, "1", True, 21])
def test_a_precision_is_a_whole_number(precision):
    with pytest.raises(ValueError, match="precision is not a whole number"):
        parse_item(dict(image="x", question="?", answer="1", precision=precision), ROOT)


T, F = True, False


def test_we_math_by_hand():
    """Steps and whole: CM; IG; IK; rote by the strict rule, mastered by the loose; rote by both; IK."""
    groups = [([T, T], T), ([T, T], F), ([T, F], F), ([T, F], T), ([F, F], T), ([F, F, F], F)]
    made = we_math(groups)
    assert [made[f"{way} strict"] for way in ("IK", "IG", "CM", "RM")] == [
        2 / 6,
        1 / 6,
        1 / 6,
        2 / 6,
    ]
    assert [made[f"{way} loose"] for way in ("IK", "IG", "CM", "RM")] == [
        2 / 6,
        1 / 6,
        2 / 6,
        1 / 6,
    ]
    assert (
        made["score strict"] == pytest.approx((6 - 0.5 - 2 - 2) / 6)
        and made["RM_rate strict"] == 2 / 3
    )
    assert (
        made["score loose"] == pytest.approx((6 - 0.5 - 1 - 2) / 6)
        and made["RM_rate loose"] == 1 / 3
    )
    assert we_math([]) == {} and we_math([([T, F], F)])["RM_rate strict"] == 0


def outcome(key, number, is_right):
    return Outcome(
        Item("x", "?", ("1",), kind=key, question_id=number), "1" if is_right else "2", ["1"]
    )


def test_we_math_joins_steps_and_wholes():
    """The same ID with two and with three steps is two problems; one without all its parts does not count."""
    two = [
        outcome("2steps_1", "1", T),
        outcome("2steps_multi", "1", T),
        outcome("2steps_2", "1", F),
    ]
    three = [outcome(f"3steps_{part}", "1", T) for part in ("1", "2", "3", "multi")]
    lone = [outcome("2steps_1", "9", T), outcome("2steps_multi", "9", T)]
    assert we_math_scores(two + three + lone) == we_math([([T, F], T), ([T, T, T], T)])
    assert we_math_scores(lone) == {} and we_math_scores([]) == {}
    assert we_math_scores([*two, outcome("other", "1", T)]) == {}
    report = full_report(two)
    assert report["score strict"] == 0.0 and "RM strict" in evaluate.table({"m": report})
