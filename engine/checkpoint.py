"""Reading a checkpoint: is it one that this project can run, and what belongs to it besides the weights.

Every check comes before anything is loaded, and every failure is one sentence for the user. Pickle is never opened and
code that comes with a checkpoint is never run.
"""

import json
from pathlib import Path

from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil
from transformers.utils import cached_file

USER_TEXT = "\x01user text\x01"  # stands for the user's text while the chat template is rendered


class CheckpointError(ValueError):
    """A model cannot be loaded; the message is one sentence for the user."""


def load_config(name_or_path: str | Path) -> Qwen2_5_VLConfig:
    """The checkpoint's configuration, after checking that it is one this project can run. Raises CheckpointError."""
    name = str(name_or_path)
    if Path(name).exists() or name.startswith((".", "/", "~")):
        if not Path(name).is_dir():
            raise CheckpointError(f"there is no model folder {name}")
        if not (Path(name) / "config.json").is_file():
            raise CheckpointError(f"the folder {name} is no checkpoint: it has no config.json")
    try:
        fields = json.loads(_read(name, "config.json") or "null")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no model {name} can be found on this machine or the hub: {first_line(error)}"
        ) from error
    if fields is None:
        raise CheckpointError(
            f"no model {name} is in the local cache, and the hub has none or cannot be reached from here"
        )
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != "qwen2_5_vl":
        raise CheckpointError(
            f"{name} is a model of type {kind!r}; only the Qwen2.5-VL family (qwen2_5_vl) is supported"
        )
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if '"auto_map"' in (_read(name, file) or ""):
            raise CheckpointError(
                f"{name} asks to run code of its own (auto_map in {file}), which is never done here"
            )
    try:
        config = Qwen2_5_VLConfig.from_pretrained(name)
    except Exception as error:
        raise CheckpointError(f"the config.json of {name} is not valid: {first_line(error)}") from error
    if config.text_config.use_sliding_window:
        raise CheckpointError(f"{name} uses sliding-window attention, which is not supported")
    return config


def load_processors(name_or_path: str | Path) -> tuple:
    """(tokenizer, image processor, text of preprocessor_config.json); needs no torchvision, unlike AutoProcessor."""
    name = str(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        preprocessor_config = _read(name, "preprocessor_config.json")
        if tokenizer.chat_template is None and (template := _read(name, "chat_template.json")):
            tokenizer.chat_template = json.loads(template)["chat_template"]
    except Exception as error:
        raise CheckpointError(
            f"{name} has no usable tokenizer or image processor: {first_line(error)}"
        ) from error
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{name} has no chat template")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": USER_TEXT}]}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise CheckpointError(f"the chat template of {name} cannot be used: {first_line(error)}") from error
    if rendered.count(USER_TEXT) != 1:
        raise CheckpointError(f"the chat template of {name} drops or repeats the user's text")
    return tokenizer, image_processor, preprocessor_config


def _read(name: str, filename: str) -> str | None:
    path = cached_file(name, filename, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path).read_text(encoding="utf-8")


def require_safetensors(name_or_path: str | Path) -> None:
    folder = Path(name_or_path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        why = "only pickle files, which are never opened here" if pickles else "no weights"
        raise CheckpointError(f"{folder} has {why}; convert them to safetensors")


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def end_ids(model) -> list[int]:
    """Every token that ends a turn: published checkpoints name two, <|im_end|> and <|endoftext|>."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.text_config.eos_token_id
    if ids is None:
        raise CheckpointError("the checkpoint names no token that ends a turn (eos_token_id)")
    return [ids] if isinstance(ids, int) else list(ids)


def vision_ids(config, tokenizer) -> list[int]:
    """Tokens that stand for image data; sampling one would claim an image that is not there."""
    ids = {
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    }
    return sorted(ids | {i for token, i in tokenizer.get_added_vocab().items() if token == "<|vision_pad|>"})
