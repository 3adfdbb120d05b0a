"""How `key=value` arguments become settings, and settings become arguments.

Hydra composes YAML groups over a typed schema, a command's dataclass; everything else sees plain dataclasses
and knows nothing of Hydra. A wrong setting becomes a `SettingError` of one or two lines.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, Transformer
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from training.errors import SettingError
from training.saved_config import flatten
from training.train_config import TrainConfig

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


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
    given = dict(map(split_setting, arguments))  # of a key that is given twice the last counts
    if given.get("experiment") == "null":
        del given["experiment"]  # Hydra takes no null for a group
    overrides = [_as_hydra_reads(key, value, schema, config_name) for key, value in given.items()]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = hydra_compose(config_name or "settings_schema", overrides=overrides)
        config: Any = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(_explain(error, schema, given)) from None
    except SettingError:
        raise
    except ValueError as error:  # as models/ raises
        raise SettingError(str(error)) from None
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(f"{key}={value} must be a finite number.")
    if "experiment" in given:
        config.experiment = given["experiment"]
    return config


def split_setting(argument: str) -> tuple[str, str]:
    """Key and value; a leading + or ++, which Hydra takes for keys that are not there yet, is left out."""
    if argument.startswith("-") or "=" not in argument:
        raise SettingError(f"{argument}: not a setting. Write key=value; --help lists the keys.")
    key, value = argument.split("=", 1)
    return key.removeprefix("+").removeprefix("+"), value


def _as_hydra_reads(key: str, value: str, schema: type, config_name: str | None) -> str:
    """`key=value` in Hydra's grammar, read by the field's type: a text is taken as it is.

    Raises:
        SettingError: no such key, no such choice of a group, or a value that can't be of the type.
    """
    kind = _type_of(key, schema)
    if value.strip("'\"") == "???":
        raise SettingError(
            f"{key}={value}: ??? is OmegaConf's mark of a missing value. Give a value, or leave {key} out."
        )
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
        if parsed is not None and value[:1] in ("'", '"'):  # in Hydra's own quotes
            return f"{key}={value}"
        if value == "null":
            raise SettingError(f"{key}=null: must be a text. For the word itself write {key}=\"'null'\".")
        text = _escaped(value)
        return f"{key}='{text}'" if config_name else f"{key}='{_no_interpolation(text)}'"
    if parsed is None or parsed.is_sweep_override():
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
    """A list of plain items: brackets may be missing, and signs that Hydra reserves, as =, may occur."""
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
    """One line out of Hydra's and OmegaConf's long messages."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None) or ""
    key = re.sub(r"\[\d+\]$", "", key)
    detail = (str(cause) or str(error)).strip().splitlines()[0]
    if key in given and isinstance(cause, ValidationError):
        return f"{key}={given[key]}: must be {_expected(_type_of(key, schema))}."
    if "${" in given.get(key, ""):
        return (
            f"{key}={given[key]}: {detail}. Write \\${{ for a plain ${{; a setting's value is for instance "
            "${model.name}."
        )
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
    """A setting for each value that `key=a,b` names, its text free of Hydra's escapes."""
    parsed = _parse(argument)
    key, _, value = argument.partition("=")
    if parsed is None and not re.search(r"[\[\]{}()'\"]", value):  # characters that Hydra's grammar lacks
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
