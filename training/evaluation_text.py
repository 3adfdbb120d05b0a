"""What a model is scored on: its own validation documents or other text, in its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_type_hints

from data.config import DataConfig, TokenizerConfig
from data.prepare import PreparedData, find_prepared, prepare
from data.tokenizer import load_tokenizer
from training.errors import SettingError
from training.evaluation import EvalDocument, describe_unknown, documents_of
from training.weights import SavedModel

CACHE_DIR = DataConfig().cache_dir  # where an evaluation may write what it prepares


@dataclass
class Text:
    """What is scored: the validation split of prepared data, which may hold all of it."""

    prepared: PreparedData
    max_tokens: int

    @property
    def longest(self) -> int:
        """Scored tokens of the longest document that is scored."""
        if self.max_tokens:
            return max(len(document.ids) - 1 for document in self.documents)
        ends = self.prepared.valid.ends.tolist()
        return max(end - start - 1 for start, end in zip([0, *ends], ends, strict=False))

    @cached_property
    def documents(self) -> list[EvalDocument]:
        return documents_of(self.prepared.valid, self.prepared.tokenizer, self.max_tokens)


def open_text(
    data: DataConfig | None,
    saved: SavedModel,
    max_tokens: int,
    opened: dict[str, Text],
    log: Callable[[str], None],
) -> Text:
    """The documents to score with this model's tokenizer, from `opened` if an earlier model had them too.

    A file, folder or hub data set is scored as a whole; of other data, the validation split. Without `data`
    the checkpoint says what is read: a line tells what that is, and nothing is written where it says.

    Args:
        data: None for the data that the model was trained on.

    Raises:
        SettingError: no text, or another tokenizer than the model's.
    """
    own_tokenizer = TokenizerConfig(kind="file", path=str(saved.tokenizer_path))
    tokenizer = own_tokenizer
    own_data = data is None
    if data is None:
        data, tokenizer = _training_data(saved)
        log(f"scoring the validation split of {_description(data)}, as {saved.path / 'config.yaml'} says")
    elif data.source in ("text", "hub"):
        data = replace(data, valid_fraction=1.0)
    key = f"{data} {saved.tokenizer.fingerprint}"
    if key not in opened:
        prepared = _prepare(data, tokenizer, log) if own_data else prepare(data, tokenizer, log=log)
        if prepared.tokenizer.fingerprint != saved.tokenizer.fingerprint:
            log(f"{saved.path}: its training data has changed since; today's validation split is scored")
            prepared = _prepare(data, own_tokenizer, log)
        if not prepared.valid.documents:
            raise SettingError(
                f"data={data.source}: {prepared.folder} has no validation documents to score. Give the text "
                "as data=text data.path=FILE, or prepare it with data.valid_fraction=1.0."
            )
        opened[key] = Text(prepared, max_tokens)
        if line := describe_unknown(prepared.valid, prepared.tokenizer):
            log(line)
    return opened[key]


def _prepare(data: DataConfig, tokenizer: TokenizerConfig, log: Callable[[str], None]) -> PreparedData:
    """A run's own data where the run prepared it; if it isn't there, prepared in this command's own cache."""
    return find_prepared(data, tokenizer) or prepare(replace(data, cache_dir=CACHE_DIR), tokenizer, log=log)


def _description(data: DataConfig) -> str:
    """The settings that say what is read."""
    keys = ("path", "valid_path", "name")
    return ", ".join(
        [f"data={data.source}", *(f"data.{key}={v}" for key in keys if (v := getattr(data, key)))]
    )


def _training_data(saved: SavedModel) -> tuple[DataConfig, TokenizerConfig]:
    """The settings of the data that the model was trained on."""
    if not saved.settings:
        raise SettingError(
            f"data is not set, and {saved.path} does not say what it was trained on. "
            "Give data=text data.path=FILE, or another data=."
        )
    try:
        settings = saved.settings
        data, tokenizer = DataConfig(**settings["data"]), TokenizerConfig(**settings["tokenizer"])
        for section in (data, tokenizer):
            for name, kind in get_type_hints(type(section)).items():
                if not isinstance(value := getattr(section, name), kind):
                    raise TypeError(f"{name} is {str(value)[:40]!r}")
        return data, tokenizer
    except (KeyError, TypeError) as error:
        raise SettingError(f"{saved.path / 'config.yaml'}: no data settings ({error}).") from None


def default_length(saved: SavedModel, text: Text) -> int:
    """The length that the model was trained on, or of the longest document if that is shorter."""
    trained = saved.settings.get("seq_len")
    if type(trained) is not int or trained < 1:
        raise SettingError(
            f"seq_lens is not set, and {saved.path} does not say its own: give seq_lens=[1024]."
        )
    return min(trained, text.longest)


def check_tokenizer(asked: TokenizerConfig | None, saved: SavedModel) -> None:
    """Refuse any tokenizer but the model's own."""
    own = saved.tokenizer
    if asked is None:
        return
    if asked.path is not None:
        matches = load_tokenizer(asked.path).fingerprint == own.fingerprint
    else:
        matches = asked.kind == own.kind
    if not matches:
        given = f"tokenizer.path={asked.path}" if asked.path else f"tokenizer={asked.kind}"
        raise SettingError(
            f"{given} is not the tokenizer of {saved.path} ({own.kind}, {own.vocab_size} ids). "
            "Leave the setting out: a model can only be scored with its own."
        )
