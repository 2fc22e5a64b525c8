"""The lm-eval harness on our model class against its own Hugging Face backend, on the same exported weights.

Tasks are made here, from local data; nothing is downloaded. Needs the extras "eval" and "interop-test".
"""

import dataclasses
import json

import numpy as np
import pytest
from test_interop import TINY_RUN, host_tree

from lmjax.data import train_bpe
from lmjax.errors import ConfigError
from lmjax.interop.hf import write_hf
from lmjax.models import Decoder

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # importing torch and the harness takes most of it

WORDS = "the model reads what it wrote and writes what it read in the evening or never".split()

CHOICES = '''
task: lmjax_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
'''
TEXTS = '''
task: lmjax_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
'''
ANSWERS = '''
task: lmjax_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [" or"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, loud enough to prefer some tokens, and tasks with texts longer than its rows."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_bpe([" ".join(WORDS)] * 2, 290)
    tokenizer.chat_template = CHAT
    config = dataclasses.replace(TINY_RUN, qk_norm=False, max_seq_len=64)
    params = host_tree(Decoder(config, seed=0))
    params["embed_VD"] = params["embed_VD"] * 20
    write_hf(folder / "model", config, params, tokenizer, add_bos=True)
    rng = np.random.default_rng(0)
    with (folder / "data.jsonl").open("w") as file:
        for i in range(12):
            words = " ".join(rng.choice(WORDS, 40 if i % 4 == 0 else 9))
            row = {"text": words, "choices": [f" {rng.choice(WORDS)} {rng.choice(WORDS)}" for _ in range(3)],
                   "label": int(rng.integers(3)), "answer": "x"}
            file.write(json.dumps(row) + "\n")
    for name, text in (("choices", CHOICES), ("texts", TEXTS), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder


CHAT = ("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}reads:{% endif %}")


def run(model, folder, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model, tasks=["lmjax_choices", "lmjax_texts", "lmjax_answers"], task_manager=tasks,
                           bootstrap_iters=0, log_samples=True, **options)


def responses(result, task: str) -> list:
    return [sample["resps"] for sample in sorted(result["samples"][task], key=lambda s: s["doc_id"])]


def numbers(nested) -> np.ndarray:
    """Every number, flag and text of a number in nested lists."""
    if isinstance(nested, (list, tuple)):
        return np.concatenate([numbers(item) for item in nested])
    return np.array([nested == "True" if nested in ("True", "False") else nested], float)


def test_equal_to_the_hugging_face_backend(folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    from lm_eval.models.huggingface import HFLM

    from lmjax.interop.lm_eval import HarnessModel

    ours = run(HarnessModel(str(folder / "model"), batch_size=3), folder)
    theirs = run(HFLM(pretrained=str(folder / "model"), batch_size=3, device="cpu", dtype="float32"), folder)
    for task in ("lmjax_choices", "lmjax_texts"):
        a, b = (numbers(responses(result, task)) for result in (ours, theirs))
        assert a.shape == b.shape and np.abs(a - b).max() < 1e-5 * np.abs(b).max(), task
        assert np.ptp(b) > 1
    assert responses(ours, "lmjax_answers") == responses(theirs, "lmjax_answers")
    assert len({str(r) for r in responses(ours, "lmjax_answers")}) > 1
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_chats_are_equal_to_the_hugging_face_backend(folder, monkeypatch):
    """With the template applied; and a text that spells a special stays text, unlike there."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    from lm_eval.models.huggingface import HFLM

    from lmjax.interop.lm_eval import HarnessModel

    model = HarnessModel(str(folder / "model"), batch_size=3)
    ours = run(model, folder, apply_chat_template=True, system_instruction="it read")
    theirs = run(HFLM(pretrained=str(folder / "model"), batch_size=3, device="cpu", dtype="float32"), folder,
                 apply_chat_template=True, system_instruction="it read")
    a, b = (numbers(responses(result, "lmjax_choices")) for result in (ours, theirs))
    assert np.abs(a - b).max() < 1e-5 * np.abs(b).max() and np.ptp(b) > 1
    assert responses(ours, "lmjax_answers") == responses(theirs, "lmjax_answers")
    plain = numbers(responses(run(model, folder), "lmjax_choices"))
    assert np.abs(a - plain).max() > 1e-3 * np.abs(b).max(), "the template must make a difference"

    def specials(text):
        return model.tok_encode(model.apply_chat_template([{"role": "user", "content": text}])).count(
            model.tokenizer.eos_id)
    assert specials("read") == specials("<|document|>") == 2
    assert model.chat_template(True) == CHAT and model.tokenizer_name == model.tokenizer.fingerprint
    with pytest.raises(ConfigError, match="one template"):
        model.chat_template("tool_use")


def test_settings_that_are_not_ours(folder):
    from lmjax.interop.lm_eval import HarnessModel

    for wrong, words in (({"batch_size": "auto"}, "batch_size='auto'"), ({"device": "cuda:0"}, "device='cuda:0'")):
        with pytest.raises(ConfigError, match=words):
            HarnessModel(str(folder / "model"), **wrong)
    model = HarnessModel(str(folder / "model"))
    with pytest.raises(ConfigError, match="generation_kwargs.num_beams=4"):
        model._sample_config({"num_beams": 4})
    sampled = model._sample_config({"temperature": 0.5, "do_sample": True, "max_gen_toks": 3})
    assert (sampled.temperature, sampled.max_new_tokens, sampled.top_p) == (0.5, 3, 1.0)
    assert model._sample_config({"temperature": 0.5, "do_sample": False}).temperature == 0
