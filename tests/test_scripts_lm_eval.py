"""The lm-evaluation-harness adapter, with the harness where it is installed and a stand-in elsewhere."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from model_helpers import make_model

from data.tokenizer import ByteTokenizer
from models.config import ModelConfig
from models.transnormer import TransNormer
from scripts.lm_eval_tasks import LmEvalConfig, local_task, main
from training.errors import SettingError


class StandIn:
    """The part of lm_eval.api.model.TemplateLM that turns texts into tokens."""

    def loglikelihood(self, requests):
        encoded = []
        for request in requests:
            context, continuation = request.args
            whole = self.tok_encode(context + continuation)
            count = len(self.tok_encode(context))
            encoded.append((request.args, whole[:count], whole[count:]))
        return self._loglikelihood_tokens(encoded)


@pytest.fixture
def adapter_class(monkeypatch):
    if importlib.util.find_spec("lm_eval") is None:
        names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lm_eval.api.model"].TemplateLM = StandIn
    module = importlib.import_module("training.lm_eval_model")
    yield module.TransnormerLM
    sys.modules.pop("training.lm_eval_model")


def tiny_model() -> TransNormer:
    return make_model(ModelConfig(vocab_size=260, hidden_size=32, num_layers=2, num_heads=2, glu_size=48))


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


@torch.no_grad()
def nats(model, ids: list[int], count: int) -> tuple[float, bool]:
    """The last `count` ids given those before, in one plain pass."""
    log_probabilities = model(torch.tensor([ids[:-1]]))[0, -count:].log_softmax(-1)
    targets = torch.tensor(ids[-count:])
    total = log_probabilities.gather(1, targets[:, None]).sum().item()
    return total, bool((log_probabilities.argmax(-1) == targets).all())


def test_loglikelihood_is_that_of_a_plain_pass(adapter_class):
    model = tiny_model()
    adapter = adapter_class(model, ByteTokenizer(), seq_len=24, batch_tokens=40)
    pairs = [("the cat", " sat"), ("a", "b"), ("x" * 30, " end"), ("one two", " three four")]
    results = adapter.loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (total, greedy) in zip(pairs, results, strict=True):
        ids = [1, *ByteTokenizer().encode(context + continuation).tolist()[-24:]]
        expected, expected_greedy = nats(model, ids, len(continuation))
        assert total == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy


def test_greedy_continuations_are_known_as_such(adapter_class):
    model = tiny_model()
    adapter = adapter_class(model, ByteTokenizer(), seq_len=64, batch_tokens=1000)
    ids = [1, *ByteTokenizer().encode("ab").tolist()]
    best = int(model(torch.tensor([ids]))[0, -1].argmax())
    other = 4 if best != 4 else 5
    results = adapter._loglikelihood_tokens([(("", ""), ids, [best]), (("", ""), ids, [other])])
    assert [greedy for _, greedy in results] == [True, False]


def test_rolling_loglikelihood_scores_every_token_and_eos_once(adapter_class):
    model = tiny_model()
    adapter = adapter_class(model, ByteTokenizer(), seq_len=16, batch_tokens=48)
    text = "a text that is longer than one window"
    (total,) = adapter.loglikelihood_rolling([request(text)])
    ids = [1, *ByteTokenizer().encode(text).tolist(), 2]
    expected = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        expected += nats(model, window, len(window) - 1)[0]
    assert total == pytest.approx(expected, rel=1e-5)


def test_generation_ends_at_a_stop_text(adapter_class):
    adapter = adapter_class(tiny_model(), ByteTokenizer(), seq_len=64, batch_tokens=1000)
    (text,) = adapter.generate_until([request("ab", {"until": [], "max_gen_toks": 12})])
    stop = text[3:5]
    (stopped,) = adapter.generate_until([request("ab", {"until": [stop], "max_gen_toks": 12})])
    assert stopped == text[: text.index(stop)]


def test_a_prompt_that_is_cut_begins_with_bos(adapter_class, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        "training.lm_eval_model.generate", lambda model, prompt, *_, **__: prompts.append(prompt) or []
    )
    adapter = adapter_class(tiny_model(), ByteTokenizer(), seq_len=8, batch_tokens=1000)
    adapter.generate_until([request(text, {}) for text in ("0123456", "0123456789")])
    assert prompts == [[1, *ByteTokenizer().encode(text).tolist()] for text in ("0123456", "3456789")]


def test_a_task_takes_its_documents_from_a_file(tmp_path):
    manager = types.SimpleNamespace(
        task_index={"piqa": types.SimpleNamespace(yaml_path=Path("/harness/piqa.yaml"))}
    )
    with pytest.raises(SettingError, match=r"holds no piqa\.jsonl"):
        local_task("piqa", manager, tmp_path, tmp_path)
    (tmp_path / "piqa.jsonl").write_text("{}\n")
    definition = Path(local_task("piqa", manager, tmp_path, tmp_path)).read_text()
    assert "include: /harness/piqa.yaml" in definition
    assert f"validation: {tmp_path / 'piqa.jsonl'}" in definition
    with pytest.raises(SettingError, match="tasks=nope"):
        local_task("nope", manager, tmp_path, tmp_path)


def test_missing_settings_are_named():
    with pytest.raises(SettingError, match="checkpoint is not set"):
        main(LmEvalConfig())
