"""Hostile files through every command that loads one: nothing runs, nothing outside is opened, all is quick.

Each payload is put into a copy of a run, an export or a folder of prepared data, whose manifest is written
again so that its hashes agree: the attacker has made the whole folder.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_ranks import launch
from reliability_checks import train
from training_helpers import settings, write_text

from data.config import DataConfig, TokenizerConfig
from data.loader import TrainLoader
from data.prepare import open_prepared
from data.shards import fingerprint_of
from scripts.sweep import SweepConfig
from training.checkpoint import open_checkpoint
from training.config import compose
from training.errors import SettingError
from training.run_folder import RunFolder
from training.saved_config import flatten, load_saved_config, model_config_from
from training.state import saved_state
from training.sweep import MEASURED, Manifest, expand
from training.weights import find_model, load_model

pytestmark = pytest.mark.slow

SECONDS, MIB = 2.0, 200.0


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Place:
    """A victim's folder: `outside` must not be opened, `canary` not be written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outside = folder, folder / "outside"
        self.canary = folder / "canary"
        self.checkpoint = folder / "run/checkpoints/step_00000002"
        self.export, self.data = folder / "export", folder / "data"
        self.run, self.sweep = folder / "run", folder / "sweep"

    def pickle(self) -> bytes:
        return pickle.dumps(Bomb(self.canary))

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.checkpoint / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def manifest(self, change: Callable[[dict], None]) -> None:
        path = self.checkpoint / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
        self.seal(manifest_only=True)

    def seal(self, manifest_only: bool = False) -> None:
        """Make every hash of the checkpoint agree with what is there."""
        path = self.checkpoint / "manifest.json"
        if not manifest_only:
            manifest = json.loads(path.read_text())
            for name, entry in manifest["files"].items():
                content = (self.checkpoint / name).read_bytes()
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            path.write_text(json.dumps(manifest))
        hash_line = hashlib.sha256(path.read_bytes()).hexdigest() + "\n"
        (self.checkpoint / "manifest.sha256").write_text(hash_line)


def pickled_weights(place: Place) -> None:
    (place.checkpoint / "rank00000-00000.safetensors").write_bytes(place.pickle())


def pickled_state(place: Place) -> None:
    (place.checkpoint / "state.json").write_bytes(place.pickle())


def pickled_tokenizer(place: Place) -> None:
    for name in ("tokenizer_info.json", "tokenizer.json"):
        (place.checkpoint / "tokenizer" / name).write_bytes(place.pickle())


def yaml_tag(place: Place) -> None:
    place.edit("config.yaml", "seed: 0", f"seed: !!python/object/apply:os.system ['touch {place.canary}']")


def target_and_interpolation(place: Place) -> None:
    place.edit("config.yaml", "model:\n", "model:\n  _target_: os.system\n  command: ${oc.env:SECRET_KEY}\n")


def alias_bomb(place: Place) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (place.checkpoint / "config.yaml").write_text("\n".join(levels))


def deep_yaml(place: Place) -> None:
    (place.checkpoint / "config.yaml").write_text("[" * 15_000 + "]" * 15_000)


def huge_yaml(place: Place) -> None:
    (place.checkpoint / "config.yaml").write_text("a: [" + "1," * 20_000_000 + "]")


def many_layers(place: Place) -> None:
    place.edit("config.yaml", "num_layers: 2", "num_layers: 1000000000")


def wide_model(place: Place) -> None:
    place.edit("config.yaml", "vocab_size: 260", f"vocab_size: {2**60}")


def numbers_that_are_none(place: Place) -> None:
    place.edit("config.yaml", "hidden_size: 32", "hidden_size: .nan")
    place.edit("state.json", '"step": 2', '"step": 1e999')


def path_out_of_the_manifest(place: Place) -> None:
    def change(manifest: dict) -> None:
        manifest["files"]["../../../outside/secret"] = {"bytes": 6, "sha256": "0" * 64}

    place.manifest(change)


def absolute_path_in_the_manifest(place: Place) -> None:
    def change(manifest: dict) -> None:
        manifest["files"][str(place.outside / "secret")] = {"bytes": 6, "sha256": "0" * 64}

    place.manifest(change)


def linked_weights(place: Place) -> None:
    weights = place.checkpoint / "rank00000-00000.safetensors"
    shutil.move(weights, place.outside / "weights")
    weights.symlink_to(place.outside / "weights")


def linked_config(place: Place) -> None:
    config = place.checkpoint / "config.yaml"
    shutil.move(config, place.outside / "config.yaml")
    config.symlink_to(place.outside / "config.yaml")


def linked_tokenizer(place: Place) -> None:
    tokenizer = place.checkpoint / "tokenizer"
    shutil.move(tokenizer, place.outside / "tokenizer")
    tokenizer.symlink_to(place.outside / "tokenizer")


def header_of_2_to_63(place: Place) -> None:
    weights = place.checkpoint / "rank00000-00000.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**63) + weights.read_bytes()[8:])


def huge_shapes(place: Place) -> None:
    place.manifest(lambda manifest: manifest["shapes"].update({"lm_head.weight": [2**40, 2**40]}))


def huge_manifest(place: Place) -> None:
    with open(place.checkpoint / "manifest.json", "wb") as file:
        file.write(b"[" * 1000)
        file.truncate(2**36)


def nested_manifest(place: Place) -> None:
    (place.checkpoint / "manifest.json").write_text("[" * 2_000_000)
    place.seal(manifest_only=True)


def manifest_of_lists(place: Place) -> None:
    (place.checkpoint / "manifest.json").write_text("[" + "[]," * 1_300_000 + "[]]")
    place.seal(manifest_only=True)


def pipe_for_a_hash(place: Place) -> None:
    (place.checkpoint / "manifest.sha256").unlink()
    os.mkfifo(place.checkpoint / "manifest.sha256")


SEALED = [
    pickled_weights,
    pickled_state,
    yaml_tag,
    target_and_interpolation,
    alias_bomb,
    deep_yaml,
    huge_yaml,
]
SEALED += [many_layers, wide_model, numbers_that_are_none, linked_weights, linked_config, header_of_2_to_63]
IN_CHECKPOINTS = [*SEALED, pickled_tokenizer, path_out_of_the_manifest, absolute_path_in_the_manifest]
IN_CHECKPOINTS += [
    linked_tokenizer,
    huge_shapes,
    huge_manifest,
    nested_manifest,
    manifest_of_lists,
    pipe_for_a_hash,
]


def pickled_model(place: Place) -> None:
    (place.export / "model.safetensors").unlink()
    (place.export / "pytorch_model.bin").write_bytes(place.pickle())


def index_with_a_path(place: Place) -> None:
    weight_map = {"lm_head.weight": "../outside/secret"}
    index = place.export / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def code_in_auto_map(place: Place) -> None:
    config = json.loads((place.export / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (place.export / "config.json").write_text(json.dumps(config))
    (place.export / "evil.py").write_text(f"import os; os.system('touch {place.canary}')")


def linked_model(place: Place) -> None:
    shutil.move(place.export / "model.safetensors", place.outside / "model")
    (place.export / "model.safetensors").symlink_to(place.outside / "model")


def many_layers_in_an_export(place: Place) -> None:
    config = json.loads((place.export / "config.json").read_text())
    key = next(key for key in ("decoder_layers", "num_layers", "num_hidden_layers") if key in config)
    config[key] = 10**9
    (place.export / "config.json").write_text(json.dumps(config))


IN_EXPORTS = [pickled_model, index_with_a_path, code_in_auto_map, linked_model, many_layers_in_an_export]


def linked_shard(place: Place) -> None:
    shutil.move(place.data / "train-00000.tokens", place.outside / "tokens")
    (place.data / "train-00000.tokens").symlink_to(place.outside / "tokens")


def shard_of_2_to_63(place: Place) -> None:
    manifest = json.loads((place.data / "manifest.json").read_text())
    manifest["splits"]["train"]["shard_tokens"] = [2**63]
    (place.data / "manifest.json").write_text(json.dumps(manifest))


def path_in_the_data(place: Place) -> None:
    manifest = json.loads((place.data / "manifest.json").read_text())
    manifest["files"]["../outside/secret"] = {"size": 6, "sha256": "0" * 64}
    (place.data / "manifest.json").write_text(json.dumps(manifest))


IN_DATA = [linked_shard, shard_of_2_to_63, path_in_the_data]


def settings_of_other_kinds(place: Place) -> None:
    place.edit("config.yaml", "seq_len: 32", "seq_len: [x]")
    place.edit("config.yaml", "  precision: ", "  precision: {}\n  other: ")


def state_of_other_kinds(place: Place) -> None:
    place.edit("state.json", '"tokens": 512', '"tokens": "many"')


IN_CHECKPOINTS += [settings_of_other_kinds, state_of_other_kinds]
SEALED += [settings_of_other_kinds, state_of_other_kinds]


def link_out(path: Path, outside: Path) -> None:
    """Put a link to something outside in a place."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside)


def linked_lock(place: Place) -> None:
    link_out(place.run / "run.lock", place.outside / "secret")


def linked_metrics(place: Place) -> None:
    link_out(place.run / "metrics.jsonl", place.outside / "secret")


def linked_log(place: Place) -> None:
    link_out(place.run / "train.log", place.outside / "secret")


def linked_plots(place: Place) -> None:
    link_out(place.run / "plots", place.outside)


def linked_evaluations(place: Place) -> None:
    link_out(place.run / "eval", place.outside)


def linked_temporary_file(place: Place) -> None:
    for name in ("report.md", "metrics.jsonl", "config.yaml"):
        (place.run / f"{name}.tmp").symlink_to(place.outside / "secret")


def huge_metrics(place: Place) -> None:
    with open(place.run / "metrics.jsonl", "wb") as file:
        file.truncate(2**36)


def pipe_for_metrics(place: Place) -> None:
    (place.run / "metrics.jsonl").unlink()
    os.mkfifo(place.run / "metrics.jsonl")


def metrics_of_anything(place: Place) -> None:
    """Values of other kinds, nesting without end, numbers without end."""
    values = ['"x"', "[]", "1e999", "9" * 4000, "null", "true", "[" * 100_000, "{}", "-1"]
    lines = [f'{{"step": {value}, "tokens": 1, "loss": 1}}' for value in values]
    keys = ("tokens", "loss", "lr", "grad_norm", "valid_loss", "mfu", "tokens_per_second")
    lines += [f'{{"step": 2, "tokens": 1, "loss": 1, "{key}": {value}}}' for key in keys for value in values]
    (place.run / "metrics.jsonl").write_text("\n".join(lines))


def evaluations_of_anything(place: Place) -> None:
    """A formula for a name, values of other kinds."""
    (place.run / "eval").mkdir()
    good = {"seq_len": 32, "window": "disjoint", "loss": 2.0, "perplexity": 8.0, "tokens": 9}
    good |= {"bits_per_byte": 1.0}
    changes = [{key: value} for key in good for value in ("x", [], 10**400, -1)]
    changes += [{"loss_by_position": [[0, 1, "x"]]}, {"loss_by_position": 5}]
    for index, change in enumerate(changes):
        evaluation = {"step": 2, "data": "$\\frac{$ ${oc.env:SECRET_KEY}", "results": [good, good | change]}
        (place.run / f"eval/{index}.json").write_text(json.dumps(evaluation))


def hostile_run_settings(place: Place) -> None:
    """What the report quotes and composes a command of."""
    config = place.run / "config.yaml"
    text = config.read_text().replace("source: text", "source: ../../outside/secret")
    config.write_text(text.replace("sample_prompt: 'def '", "sample_prompt: '${oc.env:SECRET_KEY}'"))


def layers_in_run_settings(place: Place) -> None:
    config = place.run / "config.yaml"
    config.write_text(config.read_text().replace("num_layers: 2", "num_layers: 1000000000"))


def tag_in_run_settings(place: Place) -> None:
    (place.run / "config.yaml").write_text(f"!!python/object/apply:os.system ['touch {place.canary}']")


LINKS_IN_RUNS = [linked_lock, linked_metrics, linked_log, linked_plots, linked_evaluations]
IN_RUNS = [*LINKS_IN_RUNS, linked_temporary_file, huge_metrics, pipe_for_metrics, metrics_of_anything]
IN_RUNS.append(evaluations_of_anything)
IN_RUN_SETTINGS = [hostile_run_settings, layers_in_run_settings, tag_in_run_settings]  # a resume reads none


SWEEP = {
    "models": "[tnl-tiny]",
    "seq_lens": "[32,64]",
    "batch_tokens": "64",
    "steps": "2",
    "skip_steps": "0",
    "settings": "['tokenizer=bytes']",
}
SWEEP_SETTINGS = [f"sweep.{key}={value}" for key, value in SWEEP.items()]


def change_sweep(place: Place, change: Callable[[dict], None]) -> None:
    path = place.sweep / "sweep.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def sweep_of_anything(place: Place) -> None:
    def change(manifest: dict) -> None:
        for record in manifest["points"].values():
            record["measured"]["tokens_per_second"] = "${oc.env:SECRET_KEY}"

    change_sweep(place, change)


def sweep_without_measurements(place: Place) -> None:
    def change(manifest: dict) -> None:
        for record in manifest["points"].values():
            record["measured"] = {}

    change_sweep(place, change)


def path_in_a_sweep(place: Place) -> None:
    def change(manifest: dict) -> None:
        record = next(iter(manifest["points"].values()))
        manifest["points"]["../../outside/secret"] = record | {"settings": ["run_dir=../../outside"]}

    change_sweep(place, change)


def other_settings_in_a_sweep(place: Place) -> None:
    def change(manifest: dict) -> None:
        for record in manifest["points"].values():
            record["settings"] = ["init_from=../../outside"]

    change_sweep(place, change)


def linked_point(place: Place) -> None:
    change_sweep(place, lambda manifest: [r.update(status="stopped") for r in manifest["points"].values()])
    (place.sweep / "points").mkdir()
    for name in json.loads((place.sweep / "sweep.json").read_text())["points"]:
        (place.sweep / "points" / name).symlink_to(place.outside)


def linked_point_log(place: Place) -> None:
    linked_point(place)
    for path in list((place.sweep / "points").iterdir()):
        path.unlink()
        path.with_name(f"{path.name}.log").symlink_to(place.outside / "secret")


def linked_sweep(place: Place) -> None:
    link_out(place.sweep / "sweep.json", place.outside / "secret")


def linked_sweep_plots(place: Place) -> None:
    link_out(place.sweep / "plots", place.outside)


def nested_sweep(place: Place) -> None:
    (place.sweep / "sweep.json").write_text("[" * 4_000_000)


def huge_sweep(place: Place) -> None:
    with open(place.sweep / "sweep.json", "wb") as file:
        file.truncate(2**36)


IN_SWEEPS = [sweep_of_anything, sweep_without_measurements, path_in_a_sweep, other_settings_in_a_sweep]
IN_SWEEPS += [linked_point, linked_point_log, linked_sweep, linked_sweep_plots, nested_sweep, huge_sweep]
# What these hold is left out or shown as text, and the command goes on.
HARMLESS = [
    settings_of_other_kinds,
    metrics_of_anything,
    evaluations_of_anything,
    hostile_run_settings,
    linked_temporary_file,
]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A trained run, its export and its prepared data, to be copied."""
    folder = tmp_path_factory.mktemp("clean")
    text = write_text(folder / "text")
    assert train(text, folder / "run", "max_steps=2", "keep_checkpoints=1").wait() == [0]
    export = ["-m", "scripts.export_hf", f"checkpoint={folder / 'run'}", f"output={folder / 'export'}"]
    assert launch(folder / "stderr", export).wait() == [0]
    prepared = next(path for path in (folder / "cache").iterdir() if path.is_dir())
    shutil.copytree(prepared, folder / "data")
    sweep = compose(SweepConfig, SWEEP_SETTINGS, "sweep").sweep
    (folder / "sweep").mkdir()
    manifest = Manifest(folder / "sweep", sweep, expand(sweep))
    for record in manifest.records.values():
        record |= {"status": "done", "measured": dict.fromkeys(MEASURED, 1.0), "seconds": 1.0}
    manifest.save()
    return folder


def hostile_copy(clean: Path, folder: Path, payload: Callable) -> Place:
    shutil.copytree(clean, folder)
    place = Place(folder)
    place.outside.mkdir()
    (place.outside / "secret").write_text("secret")
    payload(place)
    if payload in SEALED:
        place.seal()
    return place


def command_for(command: str, place: Place) -> list[str]:
    run, text = place.folder / "run", place.folder / "text"
    data = ["data=text", f"data.path={text}", f"data.cache_dir={place.folder / 'cache'}"]
    fresh = place.folder / "fresh"
    train = ["train.py", *settings(text, fresh, "max_steps=3")]
    evaluate = ["eval.py", "seq_lens=[32]"]
    return {
        "resume": ["train.py", *settings(text, run, "max_steps=3")],
        "init_from": [*train, f"init_from={run}"],
        "init_from export": [*train, f"init_from={place.export}"],
        "eval": [*evaluate, f"checkpoint={run}", *data],
        "eval export": [*evaluate, f"checkpoint={place.export}", *data],
        "generate": ["-m", "scripts.generate", f"checkpoint={run}", "max_tokens=2"],
        "export": ["-m", "scripts.export_hf", f"checkpoint={run}", f"output={fresh}"],
        "eval own": [*evaluate, f"checkpoint={run}"],
        "lm_eval": ["-m", "scripts.lm_eval_tasks", f"checkpoint={run}", "tasks=[x]"],
        "check_loading": ["-m", "scripts.check_loading", f"checkpoint={run}"],
        "report": ["-m", "scripts.report", f"run_dir={run}"],
        "sweep": ["-m", "scripts.sweep", "launcher=python", f"run_dir={place.sweep}", *SWEEP_SETTINGS],
        "import": ["-m", "scripts.import_hf", f"source={place.export}", f"run_dir={fresh}"],
        "train on it": [*train, "data=prepared", f"data.path={place.data}"],
    }[command]


def assert_refused(clean: Path, folder: Path, payload: Callable, command: str) -> dict:
    """Exit 2 with a short message (0 where it is harmless), and a clean report; returns the report."""
    place = hostile_copy(clean, folder / "victim", payload)
    before = listing(place.outside)
    faults = {
        0: [
            ("stand_in_for_lm_eval",),
            ("own_cache", str(folder / "cache")),
            ("watch", str(folder / "report"), str(place.outside)),
        ]
    }
    ranks = launch(folder, command_for(command, place), faults=faults, SECRET_KEY="hunter2")
    codes = ranks.wait(60)
    where, stderr = f"{payload.__name__} through {command}", ranks.stderr()
    expected = [0, 2] if payload in HARMLESS else [2]
    assert codes[0] in expected, f"{where}: {codes} {stderr[-2000:]}"
    assert "Traceback" not in stderr, where
    assert "hunter2" not in stderr, where
    assert len(stderr) < 5000, where
    assert not place.canary.exists(), where
    assert listing(place.outside) == before, where
    report = json.loads((folder / "report").read_text())
    if codes == [0]:  # a run that goes on builds DeepSpeed's operations
        report["events"] = [event for event in report["events"] if event.startswith("open ")]
    assert report["events"] == [], where
    assert codes == [0] or report["mib"] < MIB, (where, report)
    return report if codes == [2] else report | {"seconds": 0.0, "mib": 0.0}


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what it holds."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CHECKPOINT_COMMANDS = ("resume", "init_from", "eval", "eval own", "generate", "export", "lm_eval")
# A resumed run builds the model that its command names, so what the saved one says of sizes is only compared.
PAIRS = [(payload, command) for payload in IN_CHECKPOINTS for command in CHECKPOINT_COMMANDS]
PAIRS += [  # which reads no state.json
    (payload, "check_loading")
    for payload in IN_CHECKPOINTS
    if payload not in (pickled_state, state_of_other_kinds)
]
PAIRS += [
    (payload, command) for payload in IN_EXPORTS for command in ("import", "eval export", "init_from export")
]
PAIRS += [(payload, "train on it") for payload in IN_DATA]
PAIRS += [(payload, "report") for payload in (*IN_RUNS, *IN_RUN_SETTINGS)]
PAIRS += [(payload, "resume") for payload in IN_RUNS]
PAIRS += [(payload, "sweep") for payload in IN_SWEEPS]


def test_hostile_files_are_refused(clean, tmp_path):
    """Every payload through one of its commands."""
    for index, payload in enumerate(dict.fromkeys(payload for payload, _ in PAIRS)):
        commands = [command for each, command in PAIRS if each is payload]
        assert_refused(clean, tmp_path / payload.__name__, payload, commands[index % len(commands)])


@pytest.mark.torture
def test_every_hostile_file_through_every_command(clean, tmp_path, record_property):
    worst_seconds = worst_mib = 0.0
    for payload, command in PAIRS:
        report = assert_refused(clean, tmp_path / f"{payload.__name__}-{command}", payload, command)
        assert report["seconds"] < SECONDS, (payload.__name__, command, report)
        worst_seconds, worst_mib = max(worst_seconds, report["seconds"]), max(worst_mib, report["mib"])
    payloads = len({payload for payload, _ in PAIRS})
    record_property(
        "figure", f"0 of {payloads} payloads, {len(PAIRS)} combinations, ran code or opened a file outside"
    )
    record_property(
        "figure", f"at most {worst_seconds:.2f} s of processor time and {worst_mib:.0f} MiB to be refused"
    )


def mutated(content: bytes, numbers: random.Random) -> bytes:
    """A few bytes changed, cut, repeated, or tokens of JSON replaced by nasty ones."""
    data = bytearray(content)
    nasty = [
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b'"x"',
        b"[]",
        b"{}",
        str(2**63).encode(),
        b"1" * 5000,
        b'"../x"',
    ]
    for _ in range(numbers.randint(1, 4)):
        place = numbers.randrange(len(data))
        match numbers.randrange(5):
            case 0:
                data[place] = numbers.randrange(256)
            case 1:
                del data[place : place + numbers.randrange(1, 40)]
            case 2:
                data[place:place] = data[place : place + numbers.randrange(1, 200)]
            case _:
                start = data.find(b": ", place) + 2
                stop = min(
                    (i for i in (data.find(b",", start), data.find(b"}", start)) if i > 0), default=start
                )
                data[start:stop] = numbers.choice(nasty)
        data = data or bytearray(b" ")
    return bytes(data)


class Checkpoints:
    """Mutations of a checkpoint's files whose hashes agree."""

    def __init__(self, clean: Path, folder: Path) -> None:
        self.folder, self.place = folder / "step_00000002", Place(folder)
        shutil.copytree(clean / "run/checkpoints/step_00000002", self.folder)
        self.place.checkpoint = self.folder
        self.names = ["manifest.json"] * 4 + ["rank00000-00000.safetensors", "state.json", "config.yaml"]

    def seal(self, name: str) -> None:
        self.place.seal(manifest_only=name == "manifest.json")

    def load(self) -> None:
        """What a resume and an evaluation read."""
        opened = open_checkpoint(self.folder)
        saved_state(opened)
        saved = load_saved_config(opened.folder / "config.yaml")
        model_config_from(saved, opened.folder)
        flatten(saved)
        opened.weights()


class Data:
    """Mutations of prepared data, whose hashes and sizes agree unless the manifest itself is mutated."""

    def __init__(self, clean: Path, folder: Path) -> None:
        self.folder = folder / "data"
        shutil.copytree(clean / "data", self.folder)
        splits = ("train", "valid")
        self.names = ["manifest.json"] * 3 + [f"{split}.documents" for split in splits] * 3
        self.names += [f"{split}-00000.tokens" for split in splits] + ["tokenizer_info.json"]

    def seal(self, name: str) -> None:
        if name == "manifest.json":
            return
        path = self.folder / "manifest.json"
        manifest, content = json.loads(path.read_text()), (self.folder / name).read_bytes()
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"][name] = entry
        manifest["fingerprint"] = fingerprint_of(manifest["tokenizer_fingerprint"], manifest["files"])
        path.write_text(json.dumps(manifest))

    def load(self) -> None:
        """What training and an evaluation read."""
        prepared = open_prepared(self.folder, DataConfig(source="prepared", path="x"), TokenizerConfig())
        loader = TrainLoader(prepared.train, 32, 8, seed=0, isolate_documents=True)
        loader.batch(0, 0, 1, 0, 8)
        loader.num_targets(0)
        for split in (prepared.train, prepared.valid):
            for _document in split:
                pass


class Exports:
    """Mutations of an export."""

    def __init__(self, clean: Path, folder: Path) -> None:
        self.folder = folder / "export"
        shutil.copytree(clean / "export", self.folder)
        self.names = ["config.json", "config.json", "model.safetensors"]

    def seal(self, name: str) -> None:
        pass

    def load(self) -> None:
        load_model(self.folder)


def fuzz(kind, clean: Path, folder: Path, seconds: float) -> int:
    """Load mutated files for so long; only our own errors may come of it. Returns how often."""
    target, numbers = kind(clean, folder), random.Random(0)
    original = {path.name: path.read_bytes() for path in target.folder.iterdir() if path.is_file()}
    deadline, count = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        name = numbers.choice(target.names)
        content = original[name]
        if name.endswith("safetensors"):  # only its header, and its length
            content = mutated(content[:3000], numbers) + content[3000:]
        else:
            content = mutated(content, numbers)
        (target.folder / name).write_bytes(content)
        target.seal(name)
        try:
            target.load()
        except SettingError:
            pass
        except Exception as error:
            shutil.copytree(target.folder, folder / "crash", dirs_exist_ok=True)
            raise AssertionError(f"{kind.__name__}: {name} mutated, mutation {count}: {error!r}") from error
        for each, whole in original.items():
            (target.folder / each).write_bytes(whole)
        count += 1
    return count


FUZZED = (Checkpoints, Data, Exports)


@pytest.mark.parametrize("kind", FUZZED)
def test_mutated_files_are_refused_or_right(kind, clean, tmp_path):
    assert fuzz(kind, clean, tmp_path, 2) > 20


@pytest.mark.torture
@pytest.mark.parametrize("kind", FUZZED)
def test_ten_minutes_of_mutated_files(kind, clean, tmp_path, record_property):
    """A third of them for each kind."""
    count = fuzz(kind, clean, tmp_path, 200)
    record_property("figure", f"{kind.__name__.lower()}: 0 crashes in {count:,} mutations")


def test_an_evaluation_says_what_a_checkpoint_makes_it_read_and_writes_in_its_own_cache(clean, tmp_path):
    place = hostile_copy(clean, tmp_path / "victim", lambda _: None)
    text = (place.checkpoint / "config.yaml").read_text()
    inside = text.replace(f"{clean}/text", f"{place.folder}/text")
    assert inside != text
    (place.checkpoint / "config.yaml").write_text(inside.replace(f"{clean}/cache", f"{place.outside}/cache"))
    place.seal()
    faults = {0: [("own_cache", str(tmp_path / "cache"))]}
    ranks = launch(tmp_path, ["eval.py", f"checkpoint={place.run}"], faults=faults)
    assert ranks.wait() == [0], ranks.stderr()
    assert f"scoring the validation split of data=text, data.path={place.folder}/text" in ranks.stderr()
    assert [path.name for path in place.outside.iterdir()] == ["secret"]
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("linked", [True, False])
def test_a_checkpoint_that_is_no_folder_stops_the_run_before_it_starts_over(linked, tmp_path):
    """A link is not followed, and a run that passed over it would begin anew and drop its metrics."""
    folder = RunFolder(tmp_path / "run")
    step = folder.checkpoints / "step_00000006"
    folder.checkpoints.mkdir(parents=True)
    if linked:
        (tmp_path / "elsewhere").mkdir()
        step.symlink_to(tmp_path / "elsewhere")
    else:
        step.touch()
    with pytest.raises(SettingError, match=f"{step} is {'a link' if linked else 'not a folder'}"):
        folder.enter("auto", overwrite=False)


def test_a_run_does_not_hide_a_model(clean, tmp_path):
    export = shutil.copytree(clean / "export", tmp_path / "export")
    folder = RunFolder(export)
    with pytest.raises(SettingError, match=f"holds an imported or exported model.*init_from={export}"):
        folder.enter("auto", overwrite=False)
    folder.unlock()
    (export / "checkpoints").mkdir()
    assert find_model(str(export)) == export
    begun = shutil.copytree(clean / "run/checkpoints", export / "checkpoints", dirs_exist_ok=True)
    folder.enter("auto", overwrite=False)  # a run that was begun there all the same goes on
    assert find_model(str(export)).parent == begun


def test_no_secret_is_written(clean, tmp_path):
    """Keys of the environment are in no file of a run, Weights & Biases' among them."""
    secrets = {
        "WANDB_API_KEY": "a" * 37 + "KEY",
        "HF_TOKEN": "hf_SECRET",
        "AWS_SECRET_ACCESS_KEY": "awsSECRET",
    }
    more = ("max_steps=2", "wandb.enabled=true")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    ranks = train(
        clean / "text", tmp_path / "run", *more, faults={0: [("real_report",)]}, **secrets, **offline
    )
    assert ranks.wait(120) == [0], ranks.stderr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert any(path.name == "report.md" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in secrets.items() if secret.encode() in content], path
