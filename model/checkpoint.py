"""Opens a checkpoint: finds its folder, checks that this project can run it, and reads all but the weights.

    name or path --find_folder--> folder --open_checkpoint--> Checkpoint --VLM.load--> VLM

Every check comes before anything is loaded, and every failure is one sentence for the user. Pickle is never
opened, and code that comes with a checkpoint is never run. A saved checkpoint keeps the files of its source
as they were. So what has loaded that model so far, transformers 4 or 5 or vLLM, loads the trained one too.
"""

import json
import math
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessorPil,
)

from model import lora
from model.families import FAMILIES
from model.prompt import USER_TEXT, render

SMALL = ("*.json", "*.txt", "*.jinja")  # everything in a checkpoint but the weights
READ = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# A checkpoint has one of each.
TOKENIZER = ("tokenizer.json", "vocab.json")
IMAGE_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

# Neighbours of the supported families that people try, and why they do not run (docs/models.md).
NOT_SUPPORTED = {
    "qwen2_vl": "its image encoder differs from Qwen2.5-VL's",
    "qwen3_vl_moe": "its layers choose among experts",
    "qwen3_5": "three of four layers are recurrent, and a group cannot share its prompt by a mask",
    "qwen3_5_moe": "three of four layers are recurrent, and it has experts",
    "qwen2_5_omni": "it also hears and speaks",
    "qwen3_omni_moe": "it also hears and speaks, and its layers choose among experts",
    "qwen2": "it reads no images",
    "qwen3": "it reads no images",
}


class CheckpointError(ValueError):
    """A model cannot be loaded; the message is one sentence for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was opened and checked once: everything that belongs to a model but its weights."""

    name: str  # as the user wrote it: a folder or a hub id
    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    family: ModuleType  # see families.py
    end_ids: list[int]  # every token that ends a turn

    @property
    def vision_ids(self) -> list[int]:
        """Returns the tokens that stand for image data; sampled, they would claim an image that is none."""
        ids = {
            self.config.image_token_id,
            self.config.video_token_id,
            self.config.vision_start_token_id,
            self.config.vision_end_token_id,
        }
        padding = self.tokenizer.get_added_vocab().get("<|vision_pad|>")
        return sorted(ids if padding is None else ids | {padding})

    @property
    def token_side(self) -> int:
        """Returns the pixels along one side of an image token: 28 for Qwen2.5-VL, 32 for Qwen3-VL."""
        return self.image_processor.patch_size * self.image_processor.merge_size

    def pixel_limits(self, max_pixels: int | None = None) -> dict[str, int]:
        """Returns the least and most pixels of an image, as shortest_edge and longest_edge.

        max_pixels lowers the most. Where it is below the least, a small image is scaled up to one token only.
        """
        limits = dict(self.image_processor.size)
        if max_pixels is None:
            return limits
        if max_pixels < limits["shortest_edge"]:
            limits["shortest_edge"] = self.token_side**2
        limits["longest_edge"] = min(max_pixels, limits["longest_edge"])
        return limits

    def check_max_pixels(self, max_pixels: int) -> None:
        """Raises ValueError if an image of so many pixels has not one token."""
        side = self.token_side
        if max_pixels < side**2:
            token = f"one token of {side} x {side} pixels"
            raise ValueError(f"--max-pixels must be at least {side**2}, {token}, not {max_pixels}")

    def scene_side(self, max_pixels: int) -> int:
        """Returns the width of a built-in scene in pixels: 3 x 3 cells, each of whole image tokens.

        A scene is made so large that the image processor does not scale it. A cell is one token for the toy,
        and up to 4 x 4 tokens for a real model:

            tokens of 28 pixels, at most  12,544 pixels    3 x 3 cells of 1 x 1 tokens     84 pixels
            tokens of 28 pixels, at most 802,816 pixels    3 x 3 cells of 4 x 4 tokens    336 pixels

        Where only a size between them is not scaled, the borders of cells cut tokens.
        """
        limits = self.pixel_limits(max_pixels)
        cells = 3 * self.token_side
        largest = min(4 * cells, math.isqrt(limits["longest_edge"]))
        side = max(cells, largest // cells * cells)
        if side**2 < limits["shortest_edge"]:
            tokens = math.isqrt(limits["shortest_edge"] - 1) // self.token_side + 1
            side = tokens * self.token_side
        return side


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Opens and checks a local folder or a hub id. Raises CheckpointError with a sentence for the user.

    Needs no torchvision, unlike AutoProcessor.
    """
    name = str(name_or_path)
    folder = find_folder(name_or_path)
    fields = _read_config(name, folder)
    config = _parse_config(name, fields)
    tokenizer, image_processor = _load_processors(name, folder, config)
    return Checkpoint(
        name=name,
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        image_processor=image_processor,
        family=FAMILIES[config.model_type],
        end_ids=_read_end_ids(folder, fields, tokenizer),
    )


# ---- Where it is -------------------------------------------------------------------------------------------


def find_folder(name_or_path: str | Path, weights: bool = False) -> Path:
    """Returns the local folder of a checkpoint: that of a path, or of a hub id in the cache, else downloaded.

    All its files are read from there, so that nothing else asks the network. weights: download the weights
    too. Raises CheckpointError.
    """
    name = str(name_or_path)
    folder = Path(os.path.expanduser(name))
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not folder.exists() and not is_path:
        return _find_in_hub(name, weights, constants.HF_HUB_CACHE)
    if not folder.is_dir() or not name.strip():
        raise CheckpointError(f"there is no model folder {name}")
    return folder.absolute()


@cache
def _find_in_hub(name: str, weights: bool, cache_dir: str) -> Path:
    """Returns the folder of a hub id. Asks once: without a network the hub's client tries for minutes."""
    try:
        config = try_to_load_from_cache(name, "config.json", cache_dir)
        if isinstance(config, str) and _is_complete(Path(config).parent, weights):
            return Path(config).parent
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        print(f"{name} is not in the local cache: asking the hub", file=sys.stderr, flush=True)
        wanted = [*SMALL, "*.safetensors"] if weights else [*SMALL]
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=wanted))
    except Exception as error:  # of the network, the hub or the disk: they have no common ancestor
        raise CheckpointError(
            f"there is no model folder {name}, no such model in the local cache, and the hub has none or "
            f"cannot be reached from here: {first_line(error)}"
        ) from error


def _is_complete(folder: Path, weights: bool) -> bool:
    """Returns true if a cached snapshot has all that is read; a download may have been broken off."""
    if not _has_any(folder, TOKENIZER) or not _has_any(folder, IMAGE_PROCESSOR):
        return False
    try:
        return not weights or bool(find_weight_files(folder))
    except CheckpointError:
        return False


def _has_any(folder: Path, files: tuple[str, ...]) -> bool:
    return any((folder / file).is_file() for file in files)


@contextmanager
def explained(sentence: str):
    """Turns any error in a `with` block into a CheckpointError: the sentence, and the error's first line."""
    try:
        yield
    # Those of torch, transformers, safetensors, JSON and jinja have no common ancestor.
    except Exception as error:
        raise CheckpointError(f"{sentence}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Returns what an error says on its first line, and on the second if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return line if len(line) <= 200 else f"{line[:200]} ..."


# ---- Where and in what it computes -------------------------------------------------------------------------


def find_device(name) -> torch.device:
    """Returns the device of this name; None: "cuda" if there is one, else "cpu". Raises CheckpointError."""
    with explained(f"there is no device {name} here, --device cpu runs everywhere"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    return device


def find_dtype(dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of this name; None: bfloat16 on CUDA, else float32. Raises CheckpointError."""
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"a model cannot compute in {dtype}; float32 and bfloat16 are known")
    return found


# ---- Configuration -----------------------------------------------------------------------------------------


def _read_config(name: str, folder: Path) -> dict:
    """Reads config.json, after checking that no file of the folder asks for code. Raises CheckpointError."""
    adapter = read_json(folder, ADAPTER)
    fields = read_json(folder, "config.json")
    if fields is None:
        if adapter is not None:
            base = adapter.get("base_model_name_or_path")
            raise CheckpointError(
                f"{name} is an adapter, no whole model: merge it into its base, {base}"
            )
        raise CheckpointError(f"the folder {name} is no checkpoint: it has no config.json")
    if adapter is not None:
        print(f"{name}: its own weights are used, not the adapter beside them", file=sys.stderr)
    if fields.get("transformers_weights"):
        raise CheckpointError(
            f"{name} names a file of its weights (transformers_weights in config.json):"
            " only model.safetensors is known here"
        )
    for file in READ:
        content = read_json(folder, file) or {}
        parts = [part for part in (content, *content.values()) if isinstance(part, dict)]
        if any("auto_map" in part for part in parts):
            raise CheckpointError(
                f"{name} asks to run code of its own (auto_map in {file}): never done here"
            )
    if fields.get("model_type") is None and (folder / "reasoner").is_dir():
        raise CheckpointError(
            f"{name} is the folder of a run: its models are {name}/questioner and /reasoner"
        )
    return fields


def _parse_config(name: str, fields: dict) -> PreTrainedConfig:
    """Makes transformers' configuration of config.json. Raises CheckpointError for what cannot be trained."""
    kind = fields.get("model_type")
    if kind not in [*FAMILIES]:  # it may be a list
        reason = NOT_SUPPORTED.get(str(kind), "its layers are not written here")
        raise CheckpointError(
            f"{name} is a model of type {kind!r}, which is not supported: {reason};"
            " Qwen2.5-VL, MiMo-VL and Qwen3-VL (2B, 4B, 8B) are"
        )
    for part in (fields, fields.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(key):
                raise CheckpointError(
                    f"{name} is quantised ({key} in config.json) and so cannot be trained"
                )
    with explained(f"the config.json of {name} is not valid"):
        config = FAMILIES[kind].MODEL.config_class.from_dict(_without_texts(fields))
    if getattr(config.text_config, "use_sliding_window", False):
        raise CheckpointError(f"{name} uses sliding-window attention, which is not supported")
    return config


def read_json(folder: Path, file: str) -> dict | None:
    """Reads a JSON file of a checkpoint; None if it has no such file. Raises CheckpointError."""
    path = folder / file
    with explained(f"{path} cannot be read as JSON"):
        if not path.exists():
            return None
        fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return fields


def _without_texts(fields: dict) -> dict:
    """Drops special tokens that are given as text, which transformers refuses; `_read_end_ids` reads them."""
    kept = {}
    for key, value in fields.items():
        if key in ("bos_token_id", "eos_token_id", "pad_token_id") and "'" in repr(value):
            continue
        kept[key] = _without_texts(value) if isinstance(value, dict) else value
    return kept


# ---- Tokenizer, template and image processor ---------------------------------------------------------------


def _load_processors(name: str, folder: Path, config: PreTrainedConfig) -> tuple:
    """Returns (tokenizer, image processor), after checking them. Raises CheckpointError."""
    if not _has_any(folder, TOKENIZER):  # transformers makes an empty one
        raise CheckpointError(f"{name} has no tokenizer (tokenizer.json)")
    inside = (read_json(folder, "processor_config.json") or {}).get("image_processor")
    if not inside and not (folder / "preprocessor_config.json").is_file():
        raise CheckpointError(
            f"{name} has no settings of an image processor (preprocessor_config.json)"
        )
    with explained(f"{name} has no usable tokenizer or image processor"):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    vision = config.vision_config
    cut = (image_processor.patch_size, image_processor.merge_size)
    read = (vision.patch_size, vision.spatial_merge_size)
    if cut != read:
        raise CheckpointError(
            f"the image processor of {name} cuts patches of {cut[0]} pixels and merges {cut[1]} x {cut[1]},"
            f" the model reads patches of {read[0]} and merges {read[1]} x {read[1]}"
        )
    # AutoTokenizer reads the template from its own files only.
    for file in ("chat_template.json", "processor_config.json"):
        if tokenizer.chat_template is None:
            tokenizer.chat_template = (read_json(folder, file) or {}).get("chat_template")
    _check_template(name, tokenizer, config.image_token_id)
    return tokenizer, image_processor


def _check_template(name: str, tokenizer, image_token: int) -> None:
    """Raises CheckpointError unless the chat template writes one image token and the user's text once."""
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{name} has no chat template")
    with explained(f"the chat template of {name} cannot be used"):
        rendered = render(tokenizer)
        images = tokenizer(rendered, add_special_tokens=False)["input_ids"].count(image_token)
    if rendered.count(USER_TEXT) != 1:
        raise CheckpointError(f"the chat template of {name} drops or repeats the user's text")
    if images != 1:
        raise CheckpointError(
            f"the chat template of {name} writes {images or 'no'} image tokens for one image"
            f" (image_token_id {image_token})"
        )


def _read_end_ids(folder: Path, config: dict, tokenizer) -> list[int]:
    """Collects every token that ends a turn; published checkpoints name two, <|im_end|> and <|endoftext|>.

    They stand in four places, seldom all in one, as numbers or as text. Raises CheckpointError if in none.
    """
    # All that is named, in the order of the places.
    named = []
    for place in (read_json(folder, "generation_config.json"), config, config.get("text_config")):
        tokens = place.get("eos_token_id") if isinstance(place, dict) else None
        named += tokens if isinstance(tokens, list) else [tokens]
    named.append(tokenizer.eos_token_id)
    # As numbers, each once, without those that the tokenizer does not know.
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    ids = [vocabulary.get(token) if isinstance(token, str) else token for token in named]
    ids = dict.fromkeys(token for token in ids if type(token) is int and token in known)
    if not ids:
        raise CheckpointError(f"{folder} names no token that ends a turn (eos_token_id)")
    return [*ids]


# ---- Weights -----------------------------------------------------------------------------------------------


def find_weight_files(folder: Path) -> list[Path]:
    """Returns the files of the weights, all there, as transformers looks for them. Raises CheckpointError."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = read_json(folder, INDEX)
    found = any(folder.glob("*.safetensors"))
    # Nothing that could be read: say what is there in its place.
    if index is None or not found:
        why = f"no weights called model.safetensors or {INDEX}" if found else "no weights"
        if not found and any(path.suffix in (".bin", ".pt", ".pth") for path in folder.glob("*")):
            why = "only pickle files, which are never opened here"
        if any(folder.glob("adapter_model*")):
            why = "only an adapter's weights; merge them into the base model"
        raise CheckpointError(f"{folder} has {why}; convert them to safetensors")
    # Several files: all that the index names must be there.
    with explained(f"the weights of {folder} cannot be loaded: {INDEX} is no index"):
        files = sorted(set(index["weight_map"].values()))
        missing = [file for file in files if not (folder / file).is_file()]
    if missing or not files:
        raise CheckpointError(
            f"the weights of {folder} cannot be loaded: {INDEX} names files that are not there: "
            f"{len(missing)}, {(missing or ['none'])[0]} for one"
        )
    return [folder / file for file in files]


def find_weights(checkpoint: Checkpoint) -> dict[str, Path]:
    """Returns the file of each weight by its name, downloaded if need be. Raises CheckpointError."""
    folder = find_folder(checkpoint.name, weights=True)
    files: dict[str, Path] = {}
    for file in find_weight_files(folder):
        with explained(f"the weights of {folder} cannot be loaded: {file.name}"):
            with safe_open(file, "pt") as tensors:
                files |= dict.fromkeys(tensors.keys(), file)
    # A tied output matrix may be in a file, too.
    embeddings = [name for name in files if name.endswith("embed_tokens.weight")]
    if checkpoint.config.tie_word_embeddings and embeddings and "lm_head.weight" in files:
        head = _read_tensor(files["lm_head.weight"], "lm_head.weight")
        table = _read_tensor(files[embeddings[0]], embeddings[0])
        if not torch.equal(head, table):
            raise CheckpointError(
                f"{folder} says that the output matrix is the embedding (tie_word_embeddings), "
                "but has another one in its file: which is right cannot be known"
            )
    return files


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def stored_dtype(vlm) -> torch.dtype:
    """Returns the dtype that a checkpoint is published in: its config's word, or its first weight's."""
    for dtype in (vlm.config.dtype, vlm.config.text_config.dtype):
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    file = find_weight_files(vlm.source)[0]
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(min(tensors.keys())).dtype


# ---- Saving ------------------------------------------------------------------------------------------------


def exported_files(vlm) -> dict[str, bytes]:
    """Returns all files of a saved folder but the weights: the source's as they are, and what they lack."""
    source = vlm.source
    files = {}
    for pattern in SMALL:
        for path in source.glob(pattern):
            is_others = path.name == ADAPTER or path.name.endswith(".index.json")
            if path.is_file() and not is_others:
                files[path.name] = path.read_bytes()
    files.setdefault("chat_template.jinja", vlm.tokenizer.get_chat_template().encode())
    # Transformers 5 keeps these settings inside processor_config.json.
    if "preprocessor_config.json" not in files:
        inside = read_json(source, "processor_config.json")["image_processor"]
        processor = FAMILIES[vlm.model.config.model_type].PROCESSOR
        names = dict(image_processor_type="Qwen2VLImageProcessor", processor_class=processor)
        files["preprocessor_config.json"] = json.dumps(inside | names, indent=2).encode()
    if "generation_config.json" not in files:
        ends = dict(eos_token_id=vlm.end_ids, pad_token_id=vlm.tokenizer.pad_token_id)
        files["generation_config.json"] = json.dumps(ends, indent=2).encode()
    return files


def save(vlm, folder: Path) -> None:
    """Writes a checkpoint folder: the weights in the source's names and dtype, and `exported_files`."""
    files = exported_files(vlm)
    dtype = stored_dtype(vlm)
    # The weights in that dtype; a tied matrix, which has two names, stays one tensor.
    weights = lora.merged_weights(vlm.model)
    cast = {}
    for value in weights.values():
        cast.setdefault(value.data_ptr(), value.to("cpu", dtype))
    state_dict = {name: cast[value.data_ptr()] for name, value in weights.items()}
    (folder / INDEX).unlink(missing_ok=True)  # of shards that were there before
    vlm.model.save_pretrained(folder, state_dict=state_dict)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for file in folder.glob("*.safetensors"):  # made for the owner alone
        shutil.copymode(folder / "config.json", file)


def prove_export(vlm, folder: Path) -> None:
    """Shows at a run's start that `VLM.save` will have all it needs at its end. Raises CheckpointError.

    Writes everything but the weights under `folder`, reads it as plain transformers would, and removes it.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="export-", suffix=".new") as place:
        with explained(f"what is trained from {vlm.source} could not be saved"):
            for name, data in exported_files(vlm).items():
                (Path(place) / name).write_bytes(data)
            stored_dtype(vlm)
            saved = open_checkpoint(place)
        same = (
            render(saved.tokenizer) == render(vlm.tokenizer)
            and saved.end_ids == vlm.end_ids
            and saved.image_processor.to_dict() == vlm.image_processor.to_dict()
        )
        if not same:
            raise CheckpointError(
                f"what is trained from {vlm.source} would be saved with other settings"
            )
