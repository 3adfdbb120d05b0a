"""A run's config.yaml: written, read back as plain values, and compared with the settings of a resume."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from data.files import read_limited, write_atomically
from models.config import ModelConfig
from training.errors import SettingError
from training.train_config import TrainConfig

CONFIG_LIMIT_BYTES = 32 * 2**10

# What may change when a run is resumed; everything else is refused by name.
CHANGEABLE_ON_RESUME = (
    "max_steps",
    "resume",
    "overwrite",
    "run_dir",
    "log_every",
    "eval_every",
    "save_every",
    "sample_every",
    "layer_stats_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "spike_action",
    "allow_changed_data",
    "experiment",
    "sample_prompt",
    "sample_tokens",
    "engine.",
    "wandb.",
    "data.workers",
    "data.cache_dir",
    "data.verify",
)


def save_config(config: Any, path: Path) -> None:
    """Write the settings as YAML of plain values, atomically.

    Raises:
        SettingError: they are longer than what is read back.
    """
    text = yaml.safe_dump(asdict(config), sort_keys=False).encode()
    if len(text) > CONFIG_LIMIT_BYTES:
        longest = max(flatten(config).items(), key=lambda item: len(str(item[1])))[0]
        raise SettingError(
            f"{longest} is too long: the settings take {len(text):,} bytes in config.yaml, and "
            f"{CONFIG_LIMIT_BYTES:,} are allowed."
        )
    write_atomically(path, text)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which can make a small file a huge value."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def load_saved_config(path: Path) -> dict[str, Any]:
    """Read a saved config.yaml as plain values: no tags, aliases or interpolation, nothing executed."""
    content = read_limited(path, CONFIG_LIMIT_BYTES)
    try:
        content = yaml.load(content.decode(), _PlainLoader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0][:120]
        raise SettingError(f"{path}: not a readable config ({reason}).") from None
    if not isinstance(content, dict):
        raise SettingError(f"{path}: not a config, expected a mapping of settings.")
    return content


def model_config_from(saved: dict[str, Any], where: Path) -> ModelConfig:
    """The `model` section of a saved config; unknown fields are refused."""
    section = saved.get("model")
    if not isinstance(section, dict):
        raise SettingError(f"{where}: has no model section.")
    known = {f.name for f in fields(ModelConfig)}
    unknown = sorted(set(section) - known)
    if unknown:
        raise SettingError(f"{where}: unknown model settings {', '.join(unknown)}.")
    try:
        return ModelConfig(**section)
    except (ValueError, TypeError) as error:
        raise SettingError(f"{where}: {error}") from None


def check_resumable(config: TrainConfig, saved: dict[str, Any], where: Path) -> None:
    """Refuse a resume whose settings differ from the run's where they may not.

    Raises:
        SettingError: lists every such key with both values.
    """
    new, old = flatten(config), flatten(saved)
    adopted = dict.fromkeys(("schedule.total_steps", "model.vocab_size", "optim.lr"))
    adopted |= {"micro_batch_size": "auto", "init_from": None}
    changeable = CHANGEABLE_ON_RESUME + (("data.", "tokenizer.") if config.allow_changed_data else ())
    differing = [
        f"{key[:80]}={as_written(new.get(key))} "
        f"(run: {as_written(old[key])[:80] if key in old else 'older code without it'})"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key)
        and not key.startswith(changeable)
        and not (key in adopted and new.get(key) == adopted[key])
    ]
    if differing:
        is_of_data = all(text.startswith(("data.", "tokenizer.")) for text in differing)
        hint = "; allow_changed_data=true continues on other data" if is_of_data else ""
        raise SettingError(
            f"{where} was started with other settings: {'; '.join(differing)[:2000]}. "
            f"Use the run's values, or another run_dir{hint}."
        )


def as_written(value: Any) -> str:
    """A setting's value as it is given on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a dataclass (or nested dictionary) and their values."""
    flat: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else asdict(config)).items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
