"""The built-in model: its files are whole, its tokenizer loses nothing, and it was never shown its held-out text."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from amoe.builtin import builtin_model_path
from amoe.builtin.train import specialisation
from amoe.builtin.train.checkpoint import load_checkpoint
from amoe.builtin.train.config import ModelConfig
from amoe.builtin.train.corpus import HELD_OUT_MODULES, Document, is_held_out, is_test_of_held_out, load_corpus
from amoe.builtin.train.experts import Experts
from amoe.builtin.train.export import from_hf_tensors, to_hf_tensors
from amoe.builtin.train.measure import score
from amoe.builtin.train.parameters import initialise, num_parameters, parameter_shapes, views
from amoe.builtin.train.token_classes import CLASSES, classify

MAX_BYTES = 40_000_000
HELD_OUT_SNIPPET = '''def heappush(heap, item):
    """Push item onto heap, maintaining the heap invariant."""
    heap.append(item)
    _siftdown(heap, 0, len(heap)-1)

def heappop(heap):
    """Pop the smallest item off the heap, maintaining the heap invariant."""
    lastelt = heap.pop()    # raises appropriate IndexError if heap is empty
    if heap:
        returnitem = heap[0]
        heap[0] = lastelt
        _siftup(heap, 0)
        return returnitem
    return lastelt
'''


@pytest.fixture(scope="module")
def model_path() -> Path:
    return builtin_model_path()


@pytest.fixture(autouse=True)
def _eager_and_single_threaded():
    """No compilation, since these tests see every shape once; one thread, since they also run on busy machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)


def test_checkpoint_is_whole_and_small(model_path):
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names <= {path.name for path in model_path.iterdir()}
    assert sum(path.stat().st_size for path in model_path.iterdir()) < MAX_BYTES


def test_config_matches_the_issue_and_the_tensors(model_path):
    raw = json.loads((model_path / "config.json").read_text())
    assert raw["architectures"] == ["Qwen3MoeForCausalLM"] and raw["norm_topk_prob"] is True
    assert 8 <= raw["num_experts"] <= 16 and 2 <= raw["num_experts_per_tok"] <= 4 and 4 <= raw["num_hidden_layers"] <= 8
    config = ModelConfig()
    assert raw == config.to_hf()
    assert 8_000_000 <= num_parameters(parameter_shapes(config)) <= 20_000_000
    expected = to_hf_tensors(torch.zeros(num_parameters(parameter_shapes(config))), config)
    with safe_open(model_path / "model.safetensors", "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }


@pytest.mark.parametrize(
    "text",
    ["", " ", "def f(x):\n\treturn x\n", "naïve — 日本語 🙂", "a\r\n\r\n  b\x00", "    x = 1234567890  # ok\n\n\n"],
)
def test_tokenizer_round_trips(model_path, text):
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == ModelConfig().vocab_size
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_chat_template_renders_text(model_path):
    jinja2 = pytest.importorskip("jinja2")
    template = json.loads((model_path / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "system", "content": "be\nbrief"}, {"role": "user", "content": "def f(x):"}]
    assert jinja2.Template(template).render(messages=messages) == "# be\n# brief\ndef f(x):"


def test_held_out_text_and_its_tests_are_not_trained_on():
    corpus = load_corpus()
    assert {document.name for document in corpus.held_out} >= set(HELD_OUT_MODULES)
    assert not {d.name for d in corpus.train} & {d.name for d in corpus.held_out}
    assert not {d.text for d in corpus.train} & {d.text for d in corpus.held_out}
    assert not any(is_held_out(d.name) or is_test_of_held_out(d.name) for d in corpus.train)
    assert is_test_of_held_out("test/test_heapq.py") and not is_test_of_held_out("test/test_queue.py")
    # A line of a held-out module that is long enough to be its own must not come back anywhere else.
    assert not any("_siftdown(heap, 0, len(heap)-1)" in d.text for d in corpus.train)


def test_importing_the_package_needs_no_torch():
    code = "import sys, amoe.builtin; amoe.builtin.builtin_model_path(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_it_predicts_code_that_it_has_not_seen(model_path):
    """Measured 1.36 bits per byte (token frequencies alone give 2.9); `heapq` is held out."""
    checkpoint = load_checkpoint(model_path)
    tokens = torch.tensor([0, *checkpoint.tokenizer.encode(HELD_OUT_SNIPPET).ids]).numpy().astype("uint16")
    losses = score(checkpoint, tokens, 1024).losses
    assert losses.sum() / math.log(2) / len(HELD_OUT_SNIPPET.encode()) < 1.6


def test_export_and_import_are_inverse():
    config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_experts=4, moe_intermediate_size=16)
    flat = torch.empty(num_parameters(parameter_shapes(config)))
    initialise(flat, config, seed=0)
    flat.copy_(flat.bfloat16())
    back = from_hf_tensors(to_hf_tensors(flat, config), config)
    assert all(torch.equal(back[name], view) for name, view in views(flat, parameter_shapes(config)).items())


def test_experts_and_their_gradients_equal_a_plain_loop():
    torch.manual_seed(0)
    num_tokens, k, experts, hidden, width = 37, 2, 5, 8, 6
    x = torch.randn(num_tokens, hidden, requires_grad=True)
    weights = torch.rand(num_tokens, k, requires_grad=True)
    gate_up = torch.randn(experts, 2 * width, hidden, requires_grad=True)
    down = torch.randn(experts, hidden, width, requires_grad=True)
    ids = torch.rand(num_tokens, experts - 1).topk(k).indices  # the last expert gets nothing
    upstream = torch.randn(num_tokens, hidden)

    out = Experts.apply(x, weights, ids, gate_up, down)
    got = torch.autograd.grad(out, (x, weights, gate_up, down), upstream)
    rows = []
    for token in range(num_tokens):
        parts = []
        for slot in range(k):
            expert = ids[token, slot]
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            parts.append(weights[token, slot] * (down[expert] @ (torch.nn.functional.silu(gate) * up)))
        rows.append(torch.stack(parts).sum(0))
    plain = torch.stack(rows)
    want = torch.autograd.grad(plain, (x, weights, gate_up, down), upstream)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_token_classes(model_path):
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    document = Document(name="x.py", kind="library", text="return 7  # done\n")
    names = [CLASSES[label] for label in classify(tokenizer, document)]
    assert names[0] == "keyword" and "number" in names and "comment" in names and names[-1] == "space"


def test_specialisation_measures_know_their_extremes():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (4000,)).numpy()
    unrelated = torch.randint(0, 4, (4000,)).numpy()
    assert specialisation.normalised_mutual_information(labels, labels) == pytest.approx(1.0)
    assert specialisation.normalised_mutual_information(labels, unrelated) < 0.01
    even, one = torch.full((1, 4), 0.25).numpy(), torch.eye(4)[:1].numpy()
    assert specialisation.max_over_mean(even)[0] == 1.0 and specialisation.max_over_mean(one)[0] == 4.0
    assert 1.0 < specialisation.uniform_floor(100, 2, 16) < 2.0
