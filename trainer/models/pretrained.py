"""Values of a stored `transformers` model, read part by part: no process ever holds the whole of it."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.models.dispatch import empty
from trainer.models.initialise import bare, copy_values, initialise_adapters, initialise_rest, own_part, put
from trainer.models.library import line, quiet
from trainer.models.objectives import Objective, auto_class

_LOG = logging.getLogger("shardwright.models")
_AT_ONCE = 256 << 20
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHERWISE = "adapter_config.json"
"""In a folder of adapters transformers looks for the base model elsewhere."""


def fill(model: nn.Module, path: str, seed: int, load: Callable[[], nn.Module]) -> None:
    """Give `model` the stored values: part by part where that can be done, else from the whole model.

    Args:
        model: with storage, sharded or not; with or without adapters.
        path: a folder of `save_pretrained`, or a name on the hub.
        seed: of what isn't stored.
        load: the same model, whole, as transformers loads it; adapters may have any value.

    Raises:
        ConfigError: two weights are tied in the configuration and differ in the files.
        Exception: what `load` raises; OSError, SafetensorError: a file is missing or damaged.
    """
    if stream(model, path, seed):
        return
    if any(hasattr(value, "placements") for value in model.parameters()):
        _LOG.warning(
            "HFModel: every process loads the whole of %s, and keeps its part: it isn't stored as safetensors, or its "
            "shapes aren't the model's own. Store it again with transformers' save_pretrained to avoid that.",
            path,
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        source = load()
    initialise_adapters(source, seed)
    copy_values(model, source)


def stream(model: nn.Module, path: str, seed: int) -> bool:
    """Read the stored parameters and buffers into `model`, of each tensor what this rank holds.

    Names are read as `from_pretrained` reads them: renamed, converted (experts that are stored one by one), with or
    without the prefix of the base model, and tied ones under either name. What isn't stored (a new head, adapters,
    rotary frequencies) has the value that it would have there after `manual_seed(seed)`.

    Args:
        model: with storage, sharded or not; with or without adapters of `peft`.
        path: a folder of `save_pretrained`, or a name on the hub.
        seed: of what isn't stored.

    Returns:
        False, and no value was touched: there are no safetensors, or shapes aren't the model's own.

    Raises:
        ConfigError: two weights are tied in the configuration and differ in the files.
        OSError, SafetensorError: a file is missing or damaged.
    """
    files = _files(path)
    base = bare(model)
    base.tie_weights()
    if not files or getattr(base.config, "quantization_config", None) is not None:
        return False
    stored = _Stored(files)
    own = _own(base)
    plain, converted = _matched(base, own, stored)
    if any(stored.shape(key) != tuple(own[name].shape) for name, key in plain.items()):
        return False
    read: dict[int, str] = {}
    for name, key in plain.items():
        value = own[name]
        if id(value) not in read:
            put(value.detach(), stored.at(key))
            read[id(value)] = name
        elif not _equal(value.detach(), stored.at(key)):
            raise ConfigError(
                f"HFModel: {read[id(value)]!r} and {name!r} are one weight in {path}'s configuration and two in its "
                "files. Train them apart (model.config.tie_word_embeddings=false)."
            )
    for first, conversion in converted.items():
        for name, found in conversion.convert(first, model=base, config=base.config).items():
            if name in own:
                put(own[name].detach(), found[0] if isinstance(found, list) else found)
                read[id(own[name])] = name
    initialise_rest(model, [value for value in own.values() if id(value) in read], seed)
    return True


def empty_model(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model of a folder, to be filled from `tensors`; with the settings for generation that lie beside it.

    Args:
        folder: of `save_pretrained`.
        dtype: of the parameters; None: what its configuration says.

    Raises:
        ConfigError: it can't be made without other libraries, or it isn't one that continues a text.
    """
    from transformers import AutoConfig, GenerationConfig

    if (folder / _OTHERWISE).is_file():
        raise ConfigError(f"Model: {folder} holds adapters beside a model that lies elsewhere. Merge them first.")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            if getattr(config, "quantization_config", None) is not None:
                raise ConfigError(f"Model: {folder} is quantized. Take one in float32, bfloat16 or float16.")
            made_for = _generating(config)
            if made_for is None:
                name = (config.architectures or [config.model_type])[0]
                raise ConfigError(f"Model: {name} of {folder} doesn't continue a text. Take a model that does.")
            config.dtype = dtype or config.dtype
            model: Any = empty(lambda: auto_class(made_for).from_config(config, trust_remote_code=False))
            model.tie_weights()
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except ConfigError:
        raise
    except Exception as error:  # the file system, parsers and each architecture raise their own kinds
        raise ConfigError(f"Model: {folder} can't be opened: {line(error)}. Store it again.") from error
    return model


def _generating(config: Any) -> Objective | None:
    """What a model that generates is trained for; None: it doesn't."""
    for objective in (Objective.causal, Objective.seq2seq):
        mapping = auto_class(objective)._model_mapping
        made = mapping.get(type(config), ())
        names = {each.__name__ for each in (made if isinstance(made, list | tuple) else (made,))}
        if names & set(config.architectures or ()):
            return objective
    return None


def tensors(model: nn.Module, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The stored parameters and buffers of `model`, one after another; a tied weight comes once.

    Names are read as in `stream`. What is stored as it is used is mapped from its file and not copied.

    Args:
        model: on the meta device or not; without adapters.
        folder: of `save_pretrained`.

    Yields:
        Name in `model`, and its tensor on CPU, in the dtype in which it is stored.

    Raises:
        ConfigError: there are no safetensors, or they aren't this model's.
        OSError, SafetensorError: a file is missing or damaged.
    """
    from safetensors import safe_open

    files = _files(str(folder))
    if not files:
        raise ConfigError(f"Model: {folder} holds no safetensors of a whole model. Store it with save_pretrained.")
    base: Any = bare(model)
    base.tie_weights()
    own = _own(base)
    plain, converted = _matched(base, own, _Stored(files))
    given: set[int] = set()

    def first_time(name: str, tensor: Tensor) -> bool:
        if tuple(tensor.shape) != tuple(own[name].shape):
            raise ConfigError(
                f"Model: {name} of {folder} has shape {list(tensor.shape)}, and its configuration says "
                f"{list(own[name].shape)}. Store it again with save_pretrained."
            )
        before = id(own[name]) in given
        given.add(id(own[name]))
        return not before

    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored = set(opened.keys())
        here = [(name, key) for name, key in plain.items() if key in stored]
        while here:  # what was read through an opened file counts as memory until it is closed
            with safe_open(file, framework="pt") as opened:
                passed = 0
                while here and passed < _AT_ONCE:
                    name, key = here.pop(0)
                    tensor = opened.get_slice(key)[...]
                    passed += tensor.nbytes
                    if first_time(name, tensor):
                        yield name, tensor
    for first, conversion in converted.items():
        for name, found in conversion.convert(first, model=base, config=base.config).items():
            whole = found[0] if isinstance(found, list) else found
            if name in own and first_time(name, whole):
                yield name, whole
    missing = [name for name, value in base.named_parameters() if id(own.get(name)) not in given]
    if missing:
        raise ConfigError(
            f"Model: {folder} lacks {len(missing)} of its weights, the first is {missing[0]}. Store it again."
        )


@final
class _Stored:
    """The tensors of safetensors files, which are mapped into memory and not copied."""

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import safe_open

        opened = [safe_open(path, framework="pt") for path in paths]
        self.files = {str(key): file for file in opened for key in file.keys()}  # noqa: SIM118 - it is no dictionary

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.files[key].get_slice(key).get_shape())

    def at(self, key: str) -> Any:
        """Gives what it is indexed with."""
        return self.files[key].get_slice(key)


@torch.no_grad()
def _equal(target: Tensor, value: Any) -> bool:
    local, part = own_part(target)
    return not local.numel() or torch.equal(local.cpu(), value[part].to(local.dtype))


def _files(path: str) -> list[Path]:
    """The safetensors that make up the model; empty: there are none, or transformers doesn't read them directly."""
    if Path(path).is_dir():
        folder = Path(path)
        if (folder / _OTHERWISE).is_file():
            return []
        if (folder / _WHOLE).is_file():
            return [folder / _WHOLE]
        index = folder / _INDEX
        return [folder / name for name in _members(index)] if index.is_file() else []
    from transformers.utils import cached_file

    def fetched(name: str) -> Path | None:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    if fetched(_OTHERWISE) is not None:
        return []
    if (whole := fetched(_WHOLE)) is not None:
        return [whole]
    found = fetched(_INDEX)
    return [] if found is None else [Path(cached_file(path, name)) for name in _members(found)]


def _members(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _own(base: Any) -> dict[str, Tensor]:
    """Name as in a stored model -> parameter or buffer; a tied one under each of its names, its own first."""
    found = {}
    for name, value in base.state_dict(keep_vars=True).items():
        if not any(part.startswith("lora_") for part in name.split(".")):
            found[name.replace(".base_layer.", ".")] = value
    aliases = set(base.get_expanded_tied_weights_keys(all_submodels=True))
    return {name: found[name] for name in sorted(found, key=lambda name: name in aliases)}


def _matched(base: Any, own: dict[str, Tensor], stored: _Stored) -> tuple[dict[str, str], dict[str, Any]]:
    """Own name -> stored name; and first own name -> conversion, for what isn't stored as it is used."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(base)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    plain: dict[str, str] = {}
    converted: dict[str, Any] = {}
    for key in sorted(stored.files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, base.base_model_prefix, own)
        if name not in own and key in own:
            name, pattern = key, None
        if name not in own:
            continue
        if pattern is None:
            plain[name] = key
        else:
            conversion = converted.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            conversion.add_tensor(name, key, pattern, lambda key=key: stored.at(key)[...])
    return {name: plain[name] for name in own if name in plain}, converted
