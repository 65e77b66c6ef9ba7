"""Hugging Face's models from a config and from a folder: trained penalised, saved, estimated."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.conftest import assert_one_line_error, invoke, make_run

transformers = pytest.importorskip("transformers")
GPT2 = {
    "model_type": "gpt2", "vocab_size": 99, "n_positions": 16, "n_embd": 8, "n_layer": 2,
    "n_head": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
WORDS = "the cat saw a dog and the dog saw a cat but no bird\n"


@pytest.fixture
def flags(tmp_path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text(WORDS * 4)
    (tmp_path / "gpt2.json").write_text(json.dumps(GPT2))
    return ["--dataset", f"text:{tmp_path}", "--seq-len", "5", "--batch-size", "4", "--epochs", "1",
            "--optimizer", "adamw", "--lr", "0.01"]  # fmt: skip


@pytest.mark.parametrize("form", [pytest.param("batch", marks=pytest.mark.slow), "example"])
def test_a_gpt2_of_two_layers_trains_penalised_and_is_estimated(form, flags, tmp_path):
    model, out = f"hf:{tmp_path}/gpt2.json", tmp_path / "r"
    made = invoke("train", *flags, "--model", model, "--reg", "trace=0.01", "--form", form,
                  "--warmup", "0", "--out", out)  # fmt: skip
    assert made.exit_code == 0, made.output + repr(made.exception)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trace_penalty"]["curvature"] == "ggn"
    assert set(summary["metrics"]) == {"perplexity", "accuracy"}
    estimate = ["estimate-trace", out / "last.pt", "--json", "-"]
    result = invoke(*estimate, "--curvature", "ggn", "--num-probes", "2")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert json.loads(result.stdout)["trace"] > 0
    assert summary["trace"]["trace"] != 0
    content = torch.load(out / "last.pt", weights_only=True)
    assert content["state_dict"]["transformer.wte.weight"].shape == (11, 8)  # the text's words


def test_weights_in_a_folder_are_taken(flags, tmp_path, capfd):
    config = transformers.GPT2Config(**{**GPT2, "vocab_size": 256})
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained(tmp_path / "saved")
    settings = {
        "dataset": f"text:{tmp_path}", "seq_len": 5, "tokens": "byte", "train_examples": None,
        "model": f"hf:{tmp_path}/saved", "model_arg": {},
    }  # fmt: skip
    capfd.readouterr()
    run = make_run(tmp_path / "r", **settings)
    assert capfd.readouterr() == ("", "")  # no bar, and no advice
    for name, value in run.trainer.model.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name
    X = torch.arange(10).view(2, 5)
    expected = saved.eval()(X).logits
    torch.testing.assert_close(run.trainer.model.eval()(X).logits, expected)


def test_weights_that_are_not_all_there(flags, tmp_path):
    saved = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "vocab_size": 256}))
    kept = {
        n: w for n, w in saved.state_dict().items() if "h.1.mlp" not in n and "lm_head" not in n
    }
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**GPT2, "vocab_size": 256}))
    torch.save(kept, tmp_path / "saved" / "pytorch_model.bin")
    flags = ["train", *flags, "--tokens", "byte", "--model", f"hf:{tmp_path}/saved"]
    words = "its weights lack 4 of the model's, the first 'transformer.h.1.mlp.c_fc.bias'"
    assert_one_line_error(invoke(*flags), 4, f"{str(tmp_path / 'saved')!r}", words)


@pytest.mark.slow
def test_classes_of_sequences(tmp_path, flags):
    changes = {"pad_token_id": 0, "vocab_size": 9}
    (tmp_path / "gpt2.json").write_text(json.dumps({**GPT2, **changes}))
    g = np.random.default_rng(0)
    X, y = g.integers(1, 9, (24, 5)), g.integers(0, 3, 24)
    np.savez(tmp_path / "d.npz", x_train=X, y_train=y, x_test=X, y_test=y)
    flags = ["--model", f"hf:{tmp_path}/gpt2.json", "--model-arg", "n_layer=1", "--epochs", "1"]
    result = invoke("train", "--dataset", tmp_path / "d.npz", *flags, "--out", tmp_path / "r")
    assert result.exit_code == 0, result.output + repr(result.exception)
    weights = torch.load(tmp_path / "r" / "last.pt", weights_only=True)["state_dict"]
    assert weights["score.weight"].shape == (3, 8)
    assert not any(".h.1." in name for name in weights)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hf:gpt2", "does not exist; hf: takes a local folder"),
        ("hf:.", "has no config.json"),
        ("hf:wrong.json", "holds no model that can be built"),
        ("hf:text.json", "holds no model that can be built"),
    ],
)
def test_what_is_no_model(spec, words, flags, tmp_path):
    (tmp_path / "wrong.json").write_text('{"model_type": "no-such-type"}')
    (tmp_path / "text.json").write_text("no JSON")
    assert_one_line_error(invoke("train", *flags, "--model", spec), 4, words)


def test_an_encoder_reads_what_it_is_to_tell(flags, tmp_path):
    bert = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 8}  # fmt: skip
    (tmp_path / "bert.json").write_text(json.dumps(bert))
    model = f"hf:{tmp_path}/bert.json"
    result = invoke("train", *flags, "--model", model)
    assert_one_line_error(result, 4, "sees the tokens that it is to tell", "is_decoder=true")
    settings = {"dataset": f"text:{tmp_path}", "seq_len": 5, "train_examples": None}
    run = make_run(tmp_path / "r", model=model, model_arg={"is_decoder": True}, **settings)
    assert next(run.advance()).step == 1


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_that_a_folder_names_is_neither_run_nor_asked_for(what, flags, tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nclass Own: pass\n")
    own = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
    named = {"model_type": "own", "auto_map": own} if what == "model" else {
        "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}
    }  # fmt: skip
    file = "config.json" if what == "model" else "tokenizer_config.json"
    (folder / file).write_text(json.dumps(named))
    given = ["--model", f"hf:{folder}"] if what == "model" else ["--tokens", folder]
    code = 4 if what == "model" else 3
    result = invoke("train", *flags, "--model", "gpt", *given)
    assert_one_line_error(result, code, str(folder), "code of its own", "is not run")
    assert not (tmp_path / "was run").exists()


def test_windows_longer_than_the_models_places(flags, tmp_path):
    more = ["--model", f"hf:{tmp_path}/gpt2.json", "--seq-len", "17"]
    assert_one_line_error(
        invoke("train", *flags, *more), 4, "17 indices in a row (--seq-len", "up to"
    )


def test_a_setting_that_the_config_lacks(flags, tmp_path):
    model = ["--model", f"hf:{tmp_path}/gpt2.json", "--model-arg", "depth=3"]
    assert_one_line_error(invoke("train", *flags, *model), 4, "its config has no 'depth'")
