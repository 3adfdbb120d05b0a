"""Settings of a training run, and how `key=value` arguments become settings.

Hydra composes YAML groups over a typed schema (the dataclasses here and beside their owners); everything
below this module sees plain dataclasses. A wrong setting becomes a `SettingError` of one or two lines.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, Transformer
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from data.config import DataConfig, TokenizerConfig
from data.files import read_limited, write_atomically
from models.config import ModelConfig
from training.errors import SettingError
from training.optimizer import OptimConfig, ScheduleConfig, ramped

CONFIG_LIMIT_BYTES = 32 * 2**10
CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
MISSING = ("???", "'???'", '"???"')  # to OmegaConf no text, but a value that is still to be set
STANDS_FOR_MISSING = "？？？"  # while it composes

CHUNKS_NEED = {
    "attention": "lightning",
    "softmax_every": 0,
    "dropout": 0.0,
}  # engine.sequence_chunk, of model

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


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How DeepSpeed spreads and computes a step."""

    zero_stage: int = 1  # what is sharded over ranks: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights
    precision: str = "auto"  # of compute: bf16, fp32, or auto: bf16 where this machine has units for it
    fp8: bool = False  # the blocks' linear maps in 8-bit floating point while training (Ada, Hopper, later)
    offload_optimizer: bool = False  # keep optimizer state and masters in CPU memory (stage 2, 3)
    offload_parameters: bool = False  # keep weights in CPU memory (stage 3)
    compile: str = "auto"  # torch.compile of the blocks: auto (on a GPU), true, false
    sequence_chunk: int = 0  # tokens; a longer micro-batch is computed in chunks that carry the state
    timeout_minutes: float = 30.0  # a collective that takes longer ends the run
    join_seconds: float = 50.0  # ranks that come later than this after another end the start
    watchdog_seconds: float = 300.0  # training in which no rank gets on for so long ends the run

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise SettingError(f"engine.zero_stage={self.zero_stage}: allowed are 0, 1, 2, 3.")
        if self.precision == "auto":
            self.precision = native_precision()
        if self.precision not in ("bf16", "fp32"):
            raise SettingError(f"engine.precision={self.precision!r} is unknown. Allowed: auto, bf16, fp32.")
        if self.fp8 and self.precision != "bf16":
            raise SettingError(f"engine.fp8=true needs engine.precision=bf16, not {self.precision}.")
        self.compile = str(self.compile).lower()
        if self.compile not in ("auto", "true", "false"):
            raise SettingError(f"engine.compile={self.compile!r} is unknown. Allowed: auto, true, false.")
        if self.offload_optimizer and self.zero_stage < 2:
            raise SettingError("engine.offload_optimizer=true needs engine.zero_stage 2 or 3.")
        if self.offload_parameters and self.zero_stage != 3:
            raise SettingError("engine.offload_parameters=true needs engine.zero_stage=3.")
        if self.sequence_chunk < 0:
            raise SettingError(f"engine.sequence_chunk={self.sequence_chunk} must be 0 (whole) or tokens.")
        if not self.timeout_minutes > 0:
            raise SettingError(f"engine.timeout_minutes={self.timeout_minutes} must be above 0.")
        if not self.join_seconds > 0:
            raise SettingError(f"engine.join_seconds={self.join_seconds} must be above 0.")
        if not self.watchdog_seconds > 0:
            raise SettingError(f"engine.watchdog_seconds={self.watchdog_seconds} must be above 0.")

    @property
    def offloads(self) -> bool:
        """Whether anything is kept in CPU memory."""
        return self.offload_optimizer or self.offload_parameters


def native_precision() -> str:
    """bf16 on GPUs and CPUs that have units for it; fp32 elsewhere, where it would be emulated."""
    if torch.cuda.is_available():
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_units else "fp32"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases; without a key in the environment it writes offline files only."""

    enabled: bool = False
    project: str = "transnormer"
    name: str | None = None  # null: the run folder's name


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One pretraining run; see configs/train.yaml for the defaults and their meaning."""

    seed: int = 0
    run_dir: str = "outputs/run"
    seq_len: int = 1024
    batch_tokens: int = 65536
    micro_batch_size: Any = "auto"
    max_steps: int = 1000
    resume: str = "auto"
    overwrite: bool = False
    init_from: str | None = None
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    sample_every: int = 200
    layer_stats_every: int = 0
    keep_checkpoints: int = 3
    eval_tokens: int = 262144
    sample_prompt: str = "def "
    sample_tokens: int = 128
    max_skipped_steps: int = 10
    spike_action: str = "report"
    allow_changed_data: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    experiment: str | None = None  # the name of the experiment whose settings these are

    def __post_init__(self) -> None:
        for key in ("seq_len", "batch_tokens", "max_steps", "keep_checkpoints", "max_skipped_steps"):
            if getattr(self, key) < 1:
                raise SettingError(f"{key}={getattr(self, key)} must be at least 1.")
        intervals = ("log_every", "eval_every", "save_every", "sample_every", "layer_stats_every")
        for key in (*intervals, "eval_tokens", "sample_tokens"):
            if getattr(self, key) < 0:
                raise SettingError(f"{key}={getattr(self, key)} must be 0 (off) or more.")
        if self.resume not in ("auto", "never", "must"):
            raise SettingError(f"resume={self.resume!r} is unknown. Allowed: auto, never, must.")
        if self.spike_action not in ("report", "rollback", "none"):
            raise SettingError(
                f"spike_action={self.spike_action!r} is unknown. Allowed: report, rollback, none."
            )
        if self.batch_tokens % self.seq_len:
            lower = self.batch_tokens // self.seq_len * self.seq_len
            raise SettingError(
                f"batch_tokens={self.batch_tokens} is not a multiple of seq_len={self.seq_len}. "
                f"Try batch_tokens={lower or self.seq_len}."
            )
        for key, last in (("ramp_seq_len", self.seq_len), ("ramp_batch_tokens", self.batch_tokens)):
            first = getattr(self.schedule, key)
            if first is not None and (first < 1 or last % first or (last // first).bit_count() != 1):
                raise SettingError(
                    f"schedule.{key}={first} must reach {last} by doubling: try {last // 4 or last}, or null."
                )
        if self.schedule.ramp_batch_tokens is not None and self.schedule.ramp_batch_tokens % self.seq_len:
            raise SettingError(
                f"schedule.ramp_batch_tokens={self.schedule.ramp_batch_tokens} is not a multiple of "
                f"seq_len={self.seq_len}."
            )
        if self.optim.name == "muon" and self.engine.offloads:
            raise SettingError(
                "optim=muon does not work with offloading: use an engine without it, or optim=adamw."
            )
        if not self.run_dir.strip():
            raise SettingError("run_dir= is empty: give the folder of the run, as run_dir=outputs/name.")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingError(f"seed={self.seed} must be a whole number of at most 64 bits.")
        if self.micro_batch_size != "auto" and (
            type(self.micro_batch_size) is not int or self.micro_batch_size < 1
        ):
            raise SettingError(f"micro_batch_size={self.micro_batch_size!r}: a number of sequences, or auto.")

        self._check_sequence_chunk()

    def _check_sequence_chunk(self) -> None:
        """Chunks need layers with a state of constant size, and the same numbers when computed again."""
        for key, allowed in CHUNKS_NEED.items():
            value = getattr(self.model, key)
            if self.engine.sequence_chunk and value != allowed:
                raise SettingError(
                    f"engine.sequence_chunk={self.engine.sequence_chunk} does not work with "
                    f"model.{key}={value!r}: use {allowed!r}, or engine.sequence_chunk=0."
                )

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step over all ranks."""
        return self.batch_tokens // self.seq_len

    def sequences_of_step(self, step: int = 0) -> int:
        """Sequences in that step (from 0), the fewest of it and all later ones: the batch may grow."""
        first = self.schedule.ramp_batch_tokens
        return ramped(self.schedule, first, self.batch_tokens, step) // self.seq_len

    @property
    def sequences_of_ramp(self) -> list[int]:
        """Sequences in each of the steps of the schedule's ramp."""
        has_ramp = self.schedule.ramp_batch_tokens is not None
        return [self.sequences_of_step(step) for step in range(self.schedule.ramp_steps if has_ramp else 0)]


def compose(schema: type, arguments: list[str], config_name: str | None = None):
    """Build a `schema` dataclass from `key=value` arguments as Hydra reads them.

    Args:
        schema: a dataclass; unknown keys and wrong types are refused against it.
        config_name: a YAML file in configs/ whose defaults list starts with `<config_name>_schema`;
            None takes the schema's own defaults.

    Raises:
        SettingError: names the key or group, the value and what is allowed.
    """
    ConfigStore.instance().store(name=f"{config_name or 'settings'}_schema", node=schema)
    pairs = [split_setting(argument) for argument in arguments]
    given = dict(pairs)
    overrides = [
        _as_hydra_reads(key, value, schema, config_name)
        for key, value in pairs
        if key != "experiment" or given[key] != "null"  # as without it
    ]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = hydra_compose(config_name or "settings_schema", overrides=overrides)
        config: Any = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(_explain(error, schema, given)) from None
    except ValueError as error:
        kind = type(error) if isinstance(error, SettingError) else SettingError
        raise kind(str(error).replace(STANDS_FOR_MISSING, MISSING[0])) from None
    for key in (key for key, value in given.items() if value in MISSING):
        *owners, name = key.split(".")
        owner = reduce(getattr, owners, config)
        if getattr(owner, name) == STANDS_FOR_MISSING:
            setattr(owner, name, MISSING[0])
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(f"{key}={value} must be a finite number.")
    if given.get("experiment", "null") != "null":
        config.experiment = given["experiment"]
    return config


def split_setting(argument: str) -> tuple[str, str]:
    """Key and value; a leading + or ++, which Hydra takes for keys that are not there yet, is left out."""
    if argument.startswith("-") or "=" not in argument:
        raise SettingError(f"{argument}: not a setting. Write key=value; --help lists the keys.")
    key, value = argument.split("=", 1)
    return key.removeprefix("+").removeprefix("+"), value


def _as_hydra_reads(key: str, value: str, schema: type, config_name: str | None) -> str:
    """`key=value` in Hydra's grammar, read by the field's type: a text is taken as it stands.

    Raises:
        SettingError: no such key, no such choice of a group, or a value that can't be of the type.
    """
    kind = _type_of(key, schema)
    if is_dataclass(kind) or key == "experiment":
        choices = sorted(path.stem for path in (CONFIG_DIR / key).glob("*.yaml"))
        if value not in choices:
            allowed = f"Allowed: {', '.join(choices)}." if choices else f"Set its parts: {key}.<part>=value."
            raise SettingError(f"{key}={value}: unknown. {allowed}")
        return f"{key}={value}"
    kinds = get_args(kind) or (kind,)
    if value == "null" and NoneType in kinds:
        return f"{key}={value}"
    parsed = _parse(f"{key}={value}")
    if kind is Any:  # micro_batch_size, the only one: the schema says what is allowed
        return f"{key}={value}" if parsed and not parsed.is_sweep_override() else f"{key}='{_escaped(value)}'"
    if _is_list(kind):
        return f"{key}={value if parsed is not None and value.startswith('[') else _list_of(key, value)}"
    if str in kinds:
        if value in MISSING:
            return f"{key}='{STANDS_FOR_MISSING}'"
        if parsed is not None and value[:1] in ("'", '"'):  # in Hydra's own quotes
            return f"{key}={value}"
        if value == "null":
            raise SettingError(f"{key}=null: must be a text. For that very word write {key}=\"'null'\".")
        text = _escaped(value)
        return f"{key}='{text}'" if config_name else f"{key}='{_no_interpolation(text)}'"
    if parsed is None or parsed.is_sweep_override() or value in MISSING:
        several = schema is TrainConfig and parsed is not None and parsed.is_sweep_override()
        hint = " Several values in one command need -m." if several else ""
        raise SettingError(f"{key}={value}: must be {_expected(kind)}.{hint}")
    return f"{key}={value}"


def _parse(argument: str) -> Override | None:
    """As Hydra reads it, or None where it can't."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _type_of(key: str, schema: type) -> Any:
    """The annotation of a dotted key."""
    kind: Any = schema
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
        kind = next(filter(is_dataclass, get_args(kind)), kind)  # a group that may be left out
    if kind is None:
        raise SettingError(_unknown_setting(key, schema))
    return kind


def _is_list(kind: Any) -> bool:
    return any(get_origin(choice) is list for choice in (kind, *get_args(kind)))


def _list_of(key: str, value: str) -> str:
    """A list of plain items: brackets may be missing, and signs like = stand that Hydra has for itself."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if re.search(r"[\[\]{}'\"]", inner):
        raise SettingError(f"""{key}={value}: can't be read as a list. Write it as '{key}=["a=1","b=2"]'.""")
    return "[" + ",".join(f"'{_escaped(item.strip())}'" for item in inner.split(",")) + "]"


def _expected(kind: Any) -> str:
    """What a value of a type looks like."""
    kinds = get_args(kind) or (kind,)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if _is_list(kind):
        items = next(get_args(k) for k in (kind, *kinds) if get_origin(k) is list)
        word = "a list of whole numbers, as [1024,8192]" if int in items else "a list, as [a,b]"
    else:
        word = next(words[k] for k in kinds if k in words)
    return f"{word}, or null" if NoneType in kinds else word


def _escaped(text: str) -> str:
    """For single quotes around it: quotes get a backslash; backslashes before one or the end are doubled."""
    return re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)


def override(key: str, value: Any) -> str:
    """`key=value` as the command line reads it back, whatever is in a text or path."""
    if value is None or isinstance(value, bool):
        return f"{key}={'null' if value is None else str(value).lower()}"
    if isinstance(value, str | Path) and not re.fullmatch(r"(?!null$)[A-Za-z0-9_./-]+", str(value)):
        return f"{key}='{_no_interpolation(_escaped(str(value)))}'"
    return f"{key}={value}"


def _no_interpolation(text: str) -> str:
    """`${` as text: OmegaConf halves the backslashes before it, and takes an odd one as its escape."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)


def _explain(error: Exception, schema: type, given: dict[str, str]) -> str:
    """One or two lines out of Hydra's and OmegaConf's long messages."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None) or ""
    key = re.sub(r"\[\d+\]$", "", key)
    detail = (str(cause) or str(error)).strip().splitlines()[0]
    if key in given and isinstance(cause, ValidationError):
        return f"{key}={given[key]}: must be {_expected(_type_of(key, schema))}."
    return f"{key}: {detail}" if key and key not in detail else detail


def _unknown_setting(key: str, schema: type) -> str:
    """Name the unknown key and the nearest known one."""
    known = list(flatten(schema()))
    known += sorted({name.split(".")[0] for name in known if "." in name})
    nearest = difflib.get_close_matches(key, known, 1, 0.6) or [
        name for name in known if name.endswith("." + key.rsplit(".", 1)[-1])
    ]
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return f"{key}: unknown setting.{hint} --help lists all settings."


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a dataclass (or nested dictionary) and their values."""
    flat: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else asdict(config)).items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


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
        f"{key[:80]}={new.get(key)!r} (run: {repr(old.get(key))[:80]})"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key)
        and not key.startswith(changeable)
        and not (key in adopted and new.get(key) == adopted[key])
    ]
    if differing:
        is_of_data = all(text.startswith(("data.", "tokenizer.")) for text in differing)
        hint = "; allow_changed_data=true goes on with other data" if is_of_data else ""
        raise SettingError(
            f"{where} was started with other settings: {'; '.join(differing)[:2000]}. "
            f"Use the run's values, or another run_dir{hint}."
        )


def sweep_points(arguments: list[str]) -> list[list[str]]:
    """Expand `key=a,b` arguments, as `-m` takes them, into the overrides of each point, in order.

    Of a key that is given twice the last counts, as without `-m`.
    """
    points: list[list[str]] = [[]]
    for argument in {argument.split("=", 1)[0]: argument for argument in arguments}.values():
        choices = _choices(argument)
        if not choices:
            raise SettingError(f"{argument}: names no value.")
        points = [[*point, choice] for point in points for choice in choices]
    return points


def _choices(argument: str) -> list[str]:
    """A setting for each value that `key=a,b` names; texts stand in it without Hydra's escapes."""
    parsed = _parse(argument)
    key, _, value = argument.partition("=")
    if parsed is None and not re.search(r"[\[\]{}()'\"]", value):  # letters that Hydra's grammar lacks
        return [f"{key}={choice.strip()}" for choice in value.split(",")]
    if parsed is None or not parsed.is_sweep_override():
        return [argument]
    try:
        values = list(parsed.sweep_iterator(Transformer.identity))
    except (HydraException, ValueError):
        raise SettingError(f"{argument}: not a list of values. Write them out, as {key}=a,b.") from None
    return [f"{key}={_as_written(value)}" for value in values]


def _as_written(value: Any) -> str:
    if isinstance(value, QuotedString):
        return value.with_quotes()
    return value if isinstance(value, str) else Override._get_value_element_as_str(value)
