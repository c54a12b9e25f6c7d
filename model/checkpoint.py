"""Reading a checkpoint: is it one that this project can run, and what belongs to it besides the weights.

Every check comes before anything is loaded, and every failure is one sentence for the user. Pickle is never
opened and code that comes with a checkpoint is never run. A saved checkpoint keeps its source's files as they
were: what has loaded that model so far, transformers 4 or 5, vLLM, loads the trained one too.
"""

import json
import math
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, Qwen2VLImageProcessorPil

from model import lora
from model.families import FAMILIES
from model.prompt import USER_TEXT, render

SMALL = ("*.json", "*.txt", "*.jinja")  # everything in a checkpoint but the weights
READ = (
    "config generation_config tokenizer tokenizer_config chat_template preprocessor_config processor_config"
)
READ = tuple(f"{name}.json" for name in READ.split())
INDEX = "model.safetensors.index.json"


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


# ---- Where it is -------------------------------------------------------------------------------------------


def resolve(name_or_path: str | Path, weights: bool = False) -> Path:
    """The local folder of a checkpoint; of a hub id the one in the cache, else downloaded from the hub.

    All its files are read from there, so that nothing else asks the network. weights: its weights are needed
    too. Raises CheckpointError.
    """
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        if not folder.is_dir() or not name.strip():
            raise CheckpointError(f"there is no model folder {name}")
        return folder.absolute()
    return _from_hub(name, weights, constants.HF_HUB_CACHE)


def has_weights(name_or_path: str | Path) -> bool:
    """Whether its weights are on this machine, so that loading them asks no network."""
    return any(resolve(name_or_path).glob("*.safetensors"))


@cache
def _from_hub(name: str, weights: bool, place: str) -> Path:
    """The folder of a hub id, asked for once: without a network the hub's client tries for minutes."""
    cached = None
    try:
        config = try_to_load_from_cache(name, "config.json", place)
        cached = Path(config).parent if isinstance(config, str) else None
        if cached and _complete(cached, weights):
            return cached
        print(f"{name} is not in the local cache: asking the hub", file=sys.stderr, flush=True)
        wanted = [*SMALL, "*.safetensors"] if weights else [*SMALL]
        return Path(snapshot_download(name, cache_dir=place, allow_patterns=wanted))
    except HFValidationError as error:
        raise CheckpointError(f"there is no model folder {name}, and a hub id does not look so") from error
    except Exception as error:  # of the network, the hub or the disk: they have no common ancestor
        if cached:  # what it lacks is said by who needs it
            return cached
        raise CheckpointError(
            f"no model {name} is in the local cache, and the hub has none or cannot be reached from here: "
            f"{first_line(error)}"
        ) from error


def _complete(folder: Path, weights: bool) -> bool:
    """Whether a cached snapshot has all that is read; a download may have been broken off."""
    one_of = [("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json")]
    there = all(any((folder / name).is_file() for name in names) for names in one_of)
    try:
        return there and (not weights or bool(weight_files(folder)))
    except CheckpointError:
        return False


def check_device(name) -> torch.device:
    """The device of this name; default "cuda" if there is one, else "cpu". Raises CheckpointError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError or AttributeError, as it happens
        raise CheckpointError(f"there is no device {name} here, such as cpu, cuda or cuda:0") from error
    return device


def check_dtype(dtype, device: torch.device) -> torch.dtype:
    """The dtype of this name; default bfloat16 on CUDA, else float32. Raises CheckpointError."""
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"a model cannot compute in {dtype}; float32 and bfloat16 are known")
    return found


# ---- Configuration -----------------------------------------------------------------------------------------


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The configuration, after checking that it is one this project can run. Raises CheckpointError."""
    folder = resolve(name_or_path)
    adapter, name = read_json(folder, "adapter_config.json"), str(name_or_path)
    if not (folder / "config.json").is_file():
        if adapter is not None:
            base = adapter.get("base_model_name_or_path")
            raise CheckpointError(f"{name} is an adapter, no whole model: merge it into its base, {base}")
        raise CheckpointError(f"the folder {name} is no checkpoint: it has no config.json")
    for file in READ:
        fields = read_json(folder, file) or {}
        if any("auto_map" in part for part in (fields, *fields.values()) if isinstance(part, dict)):
            raise CheckpointError(f"{name} asks to run code of its own (auto_map in {file}): never done here")
    fields = read_json(folder, "config.json")
    kind = fields.get("model_type")
    if kind is None and (folder / "reasoner").is_dir():
        raise CheckpointError(
            f"{name} is the folder of a run: its models are {name}/questioner and /reasoner"
        )
    if kind not in [*FAMILIES]:
        reason = NOT_SUPPORTED.get(str(kind), "its layers are not written here")
        raise CheckpointError(
            f"{name} is a model of type {kind!r}, which is not supported: {reason};"
            " Qwen2.5-VL, MiMo-VL and Qwen3-VL (2B, 4B, 8B) are"
        )
    for part in (fields, fields.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(key):
                raise CheckpointError(f"{name} is quantised ({key} in config.json) and so cannot be trained")
    try:
        config = FAMILIES[kind].MODEL.config_class.from_dict(_without_texts(fields))
    except Exception as error:
        raise CheckpointError(f"the config.json of {name} is not valid: {first_line(error)}") from error
    if getattr(config.text_config, "use_sliding_window", False):
        raise CheckpointError(f"{name} uses sliding-window attention, which is not supported")
    return config


def read_json(folder: Path, file: str) -> dict | None:
    """A JSON file of a checkpoint, None if it has no such file. Raises CheckpointError."""
    try:
        fields = json.loads((folder / file).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / file} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{folder / file} is no JSON object")
    return fields


def _without_texts(fields: dict) -> dict:
    """A configuration without tokens given as text, which transformers refuses; `end_ids` reads them."""
    given = {"bos_token_id", "eos_token_id", "pad_token_id"}
    kept = {k: v for k, v in fields.items() if k not in given or "'" not in repr(v)}
    return {k: _without_texts(v) if isinstance(v, dict) else v for k, v in kept.items()}


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


# ---- Tokenizer, template and image processor ---------------------------------------------------------------


def load_processors(name_or_path: str | Path) -> tuple:
    """Returns (tokenizer, image processor, the folder they come from).

    Needs no torchvision, unlike AutoProcessor. Raises CheckpointError.
    """
    name, config, folder = str(name_or_path), load_config(name_or_path), resolve(name_or_path)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{name} has no tokenizer (tokenizer.json)")  # transformers makes an empty one
    inside = (read_json(folder, "processor_config.json") or {}).get("image_processor")
    if not inside and not (folder / "preprocessor_config.json").is_file():
        raise CheckpointError(f"{name} has no settings of an image processor (preprocessor_config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(
            f"{name} has no usable tokenizer or image processor: {first_line(error)}"
        ) from error
    if image_processor.patch_size * image_processor.merge_size != token_side(config):
        raise CheckpointError(
            f"the image processor of {name} cuts patches of {image_processor.patch_size} pixels,"
            f" the model reads patches of {config.vision_config.patch_size}"
        )
    for file in ("chat_template.json", "processor_config.json"):
        if tokenizer.chat_template is None:
            tokenizer.chat_template = (read_json(folder, file) or {}).get("chat_template")
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{name} has no chat template")
    _check_template(name, tokenizer, config.image_token_id)
    end_ids(folder, tokenizer)
    return tokenizer, image_processor, folder


def token_side(config: PreTrainedConfig) -> int:
    """Returns the pixels along one side of an image token: 28 for Qwen2.5-VL, 32 for Qwen3-VL."""
    return config.vision_config.patch_size * config.vision_config.spatial_merge_size


def pixel_limits(image_processor, max_pixels: int | None = None) -> dict[str, int]:
    """Returns the least and most pixels of an image, as shortest_edge and longest_edge.

    max_pixels lowers the most. Below the checkpoint's least, a small image is scaled up to one token only.
    """
    limits = dict(image_processor.size)
    if max_pixels is None:
        return limits
    if max_pixels < limits["shortest_edge"]:
        limits["shortest_edge"] = (image_processor.patch_size * image_processor.merge_size) ** 2
    limits["longest_edge"] = min(max_pixels, limits["longest_edge"])
    return limits


def check_max_pixels(max_pixels: int, token_side: int) -> None:
    """Raises ValueError if an image of so many pixels has not one token."""
    if max_pixels < token_side**2:
        token = f"one token of {token_side} x {token_side} pixels"
        raise ValueError(f"--max-pixels must be at least {token_side**2}, {token}, not {max_pixels}")


def scene_side(limits: dict[str, int], token_side: int) -> int:
    """Returns the width of a built-in scene in pixels: 3 x 3 cells, each of whole image tokens.

    A cell is one token for the toy (84 pixels a scene), and up to 4 x 4 tokens for a real model. A scene is
    made so large that the image processor does not scale it; where only another size does, cells are cut.
    """
    cells = 3 * token_side
    largest = min(4 * cells, math.isqrt(limits["longest_edge"]))
    side = max(cells, largest // cells * cells)
    if side**2 < limits["shortest_edge"]:
        tokens = math.isqrt(limits["shortest_edge"] - 1) // token_side + 1
        side = tokens * token_side
    return side


def _check_template(name: str, tokenizer, image_token: int) -> None:
    try:
        rendered = render(tokenizer)
        images = tokenizer(rendered, add_special_tokens=False)["input_ids"].count(image_token)
    except Exception as error:
        raise CheckpointError(f"the chat template of {name} cannot be used: {first_line(error)}") from error
    if rendered.count(USER_TEXT) != 1:
        raise CheckpointError(f"the chat template of {name} drops or repeats the user's text")
    if images != 1:
        raise CheckpointError(
            f"the chat template of {name} writes {images or 'no'} image tokens for one image"
            f" (image_token_id {image_token})"
        )


def end_ids(folder: Path, tokenizer) -> list[int]:
    """Every token that ends a turn; published checkpoints name two, <|im_end|> and <|endoftext|>.

    They stand in four places, seldom all in one, as numbers or as text. Raises CheckpointError if in none.
    """
    config = read_json(folder, "config.json") or {}
    places = [read_json(folder, "generation_config.json"), config, config.get("text_config")]
    named = [place.get("eos_token_id") for place in places if isinstance(place, dict)]
    vocabulary, ids = tokenizer.get_vocab(), []
    known = set(vocabulary.values())
    for token in [t for n in [*named, tokenizer.eos_token_id] for t in (n if isinstance(n, list) else [n])]:
        token = vocabulary.get(token) if isinstance(token, str) else token
        if type(token) is int and token in known and token not in ids:
            ids.append(token)
    if not ids:
        raise CheckpointError(f"{folder} names no token that ends a turn (eos_token_id)")
    return ids


def vision_ids(config, tokenizer) -> list[int]:
    """Tokens that stand for image data; sampling one would claim an image that is not there."""
    ids = {
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    }
    return sorted(ids | {i for token, i in tokenizer.get_added_vocab().items() if token == "<|vision_pad|>"})


# ---- Weights -----------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, all there, as transformers looks for them. Raises CheckpointError."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index, names = read_json(folder, INDEX), [path.name for path in folder.glob("*")]
    found = [name for name in names if name.endswith(".safetensors")]
    if index is None or not found:
        why = f"no weights called model.safetensors or {INDEX}" if found else "no weights"
        if not found and any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            why = "only pickle files, which are never opened here"
        if any(name.startswith("adapter_model") for name in names):
            why = "only an adapter's weights; merge them into the base model"
        raise CheckpointError(f"{folder} has {why}; convert them to safetensors")
    try:
        files = sorted(set(index["weight_map"].values()))
        missing = [file for file in files if not (folder / file).is_file()]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the weights of {folder} cannot be loaded: {INDEX} is no index") from error
    if missing or not files:
        raise CheckpointError(
            f"the weights of {folder} cannot be loaded: {INDEX} names {len(missing)} files that are not "
            f"there, {(missing or ['none'])[0]} among them"
        )
    return [folder / file for file in files]


def check_weights(folder: Path, tied: bool) -> None:
    """Looks into the weight files before they are loaded. Raises CheckpointError."""
    where, files = {}, weight_files(folder)
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), file)
        except Exception as error:
            raise CheckpointError(
                f"the weights of {folder} cannot be loaded: {file.name}: {first_line(error)}"
            ) from error
    embeddings = [name for name in where if name.endswith("embed_tokens.weight")]
    if tied and embeddings and "lm_head.weight" in where:
        head, table = (_tensor(where[name], name) for name in ("lm_head.weight", embeddings[0]))
        if not torch.equal(head, table):
            raise CheckpointError(
                f"{folder} says that the output matrix is the embedding (tie_word_embeddings), "
                "but has another one in its file: which is right cannot be known"
            )


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of numbers that a checkpoint is published in: its config's word, or its first weight's."""
    config = read_json(folder, "config.json") or {}
    text = config.get("text_config") or {}
    for said in (config.get("dtype"), config.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype")):
        dtype = getattr(torch, said.removeprefix("torch."), None) if isinstance(said, str) else None
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    with safe_open(weight_files(folder)[0], "pt") as tensors:
        return tensors.get_tensor(min(tensors.keys())).dtype


# ---- Saving ------------------------------------------------------------------------------------------------


def kept_files(vlm) -> dict[str, bytes]:
    """Everything in a saved folder but the weights: the source's files as they are, and what they lack."""
    source, tokenizer = vlm.source, vlm.tokenizer
    paths = [path for pattern in SMALL for path in source.glob(pattern) if path.is_file()]
    files = {path.name: path.read_bytes() for path in paths if not path.name.endswith(".index.json")}
    files.setdefault("chat_template.jinja", tokenizer.get_chat_template().encode())
    if "preprocessor_config.json" not in files:  # transformers 5 keeps it inside processor_config.json
        inside = read_json(source, "processor_config.json")["image_processor"]
        processor = FAMILIES[vlm.model.config.model_type].PROCESSOR
        names = dict(image_processor_type="Qwen2VLImageProcessor", processor_class=processor)
        files["preprocessor_config.json"] = json.dumps(inside | names, indent=2).encode()
    if "generation_config.json" not in files:
        ends = dict(eos_token_id=vlm.end_ids, pad_token_id=tokenizer.pad_token_id)
        files["generation_config.json"] = GenerationConfig(**ends).to_json_string().encode()
    return files


def save(vlm, folder: Path) -> None:
    """Writes a checkpoint folder: the weights in the source's names and type of numbers, and `kept_files`."""
    files, dtype, written = kept_files(vlm), stored_dtype(vlm.source), vlm.model.generation_config
    weights, cast = lora.merged_weights(vlm.model), {}
    for value in weights.values():  # a tied matrix stays one tensor
        cast.setdefault(value.data_ptr(), value.to("cpu", dtype))
    vlm.model.generation_config = GenerationConfig()  # published ones may not pass transformers' own checks
    try:
        cast = {name: cast[value.data_ptr()] for name, value in weights.items()}
        (folder / INDEX).unlink(missing_ok=True)  # of shards that were there before
        vlm.model.save_pretrained(folder, state_dict=cast)
    finally:
        vlm.model.generation_config = written
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for file in folder.glob("*.safetensors"):  # made for the owner alone
        shutil.copymode(folder / "config.json", file)


def prove_export(vlm, folder: Path) -> None:
    """Shows at a run's start that `VLM.save` will have all it needs at its end. Raises CheckpointError.

    Writes everything but the weights under `folder`, reads it as plain transformers would, and removes it.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="export-", suffix=".new") as place:
        try:
            for name, data in kept_files(vlm).items():
                (Path(place) / name).write_bytes(data)
            stored_dtype(vlm.source)
            tokenizer, image_processor, _ = load_processors(place)
        except Exception as error:
            raise CheckpointError(
                f"what is trained from {vlm.source} could not be saved: {first_line(error)}"
            ) from error
        same = render(tokenizer) == render(vlm.tokenizer) and end_ids(Path(place), tokenizer) == vlm.end_ids
        if not same or image_processor.to_dict() != vlm.image_processor.to_dict():
            raise CheckpointError(f"what is trained from {vlm.source} would be saved with other settings")
