"""Which system wrote a folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from strategies.errors import ConfigError
from trainer.imports import accelerate_files, deepspeed_files
from trainer.imports.source import Source


def open_source(folder: Path, ignored: Collection[str] = ()) -> Source:
    """What a folder of DeepSpeed's or Accelerate's holds; tensors are read when they are asked for.

    Args:
        folder: DeepSpeed's, with `latest` or one of its steps; or that of `accelerator.save_state`.
        ignored: full names of classes in its files that may stand for nothing.

    Raises:
        ConfigError: it is no such folder, or not one that can be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"import: there is no folder {folder}. Name one that DeepSpeed or Accelerate wrote.")
    inside = _newest(folder)
    if any(inside.glob("*_model_states.pt")):
        return deepspeed_files.read(inside, ignored)
    found = accelerate_files.read(inside, ignored)
    if found is None:
        raise ConfigError(
            f"import: {inside} holds nothing of DeepSpeed (*_model_states.pt) or Accelerate (model.safetensors, "
            "pytorch_model.bin, pytorch_model_fsdp.bin, pytorch_model_fsdp_0/). Name the folder that was given to "
            "save_checkpoint or save_state."
        )
    return found


def _newest(folder: Path) -> Path:
    """Where DeepSpeed's `latest` points to, if there is one."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return folder
    tag = pointer.read_text(errors="replace").strip()
    if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
        raise ConfigError(f"import: {pointer} names {tag!r}, and there is no such folder beside it. Name it yourself.")
    return folder / tag
