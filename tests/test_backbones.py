"""Which backbones run: equal to transformers' own forward of their class, and the others refused by name."""

import json

import mixture
import pytest
import torch
from test_model import as_transformers_asks, make_batch, random_rollouts
from transformers import AutoModelForImageTextToText, Qwen3VLMoeForConditionalGeneration

from data import DataError
from model import DeScore

# Ours in float32, its experts in one grouped product, as they run; transformers' in float64, one by one.
NEAR = {"rtol": 0, "atol": 2e-4, "check_dtype": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mixture.write(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def model(folder):
    """A mixture with an adapter that is not zero."""
    torch.manual_seed(0)
    model = DeScore.load(folder, device="cpu")
    model.set_trainable(4)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def own(model, folder):
    """transformers' own model of it, each expert in turn, the adapter merged into its weights."""
    own = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager").double()
    assert type(own) is Qwen3VLMoeForConditionalGeneration
    weights = dict(model.backbone.named_parameters())
    for name, parameter in own.named_parameters():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.default.weight" in weights:
            a, b = (weights[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            parameter.data += 2 * (b @ a).detach()  # alpha = 2 · rank
    return own


@torch.no_grad()
def test_a_mixture_of_experts_computes_what_transformers_computes(model, own, keys):
    """Hidden states, log-probabilities and scores of groups, and greedy thinking."""
    tokens, mask = random_rollouts(model, 2, 3, 6)
    tokens[tokens == model.processor.video_id] = 7  # transformers takes it for a video
    logps, scores = model.group(make_batch(model, keys[:2]), tokens, mask)
    for b in range(2):
        batch = model.encode(make_batch(model, keys[b : b + 1]))
        for g in range(3):
            ids = tokens[b, g][mask[b, g]]
            read = ids[ids != model.eos]
            asked = as_transformers_asks(model, keys[b], read.tolist())
            hidden = own.model(**asked).last_hidden_state[0]
            P = len(hidden) - len(read)
            found = model.forward_rows(batch, tokens[b : b + 1, g : g + 1], mask[b : b + 1, g : g + 1])[0]
            torch.testing.assert_close(found[0, :-1], hidden, **NEAR)  # [Reward] comes last
            expected = own.lm_head(hidden[P - 1 :]).log_softmax(-1)[range(len(ids)), ids]
            torch.testing.assert_close(logps[b, g, : len(ids)], expected, **NEAR)
    thoughts = model.think(make_batch(model, keys[:1]), max_new_tokens=40, temperature=0)
    asked = as_transformers_asks(model, keys[0])
    own_tokens = own.generate(**asked, max_new_tokens=40, do_sample=False, eos_token_id=model.eos,
                              pad_token_id=model.eos)[0, asked["input_ids"].shape[1] :]
    assert thoughts.tokens[0, 0].tolist() == own_tokens.tolist()
    of_think = model.group(make_batch(model, keys[:1]), thoughts.tokens, thoughts.mask)
    torch.testing.assert_close(of_think, (thoughts.logps, thoughts.scores), **NEAR)
    assert scores.std() > 1e-3


def test_lora_leaves_a_mixtures_experts_and_router_alone(model):
    adapted = {name.split(".layers.")[1] for name in model.trainable() if ".lora_A." in name}
    layers = {int(name.split(".")[0]) for name in adapted}
    kinds = {name.split(".", 1)[1].split(".lora_")[0] for name in adapted}
    assert layers == set(range(5)) and not any("experts" in kind or kind == "mlp.gate" for kind in kinds)
    dense = {name for name in adapted if ".mlp." in name}
    assert len(dense) == 3 and all(name.startswith(f"{mixture.DENSE}.") for name in dense)


def test_a_mixture_that_trained_as_a_whole_is_what_it_was(folder, keys, tmp_path):
    model = DeScore.load(folder, device="cpu")
    model.set_trainable(0)
    model.score(make_batch(model, keys[:1]), ["a red circle"]).sum().backward()
    experts = [p for name, p in model.trainable().items() if ".experts." in name]
    assert len(experts) == 8 and all(p.grad.any() for p in experts)
    for parameter in experts:
        parameter.data *= 1.01
    model.save(tmp_path / "m")
    again = DeScore.load(tmp_path / "m", device="cpu").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(("kind", "why"), [
    ("qwen2_5_vl", "does not say the seconds of frames"),
    ("qwen3_5", "keep a running state"),
    ("qwen3_5_moe", "keep a running state"),
])
def test_what_does_not_run_is_refused_by_name(kind, why, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(DataError, match=f"it is a {kind}: .*{why}.*[^.]$") as found:
        DeScore.load(tmp_path)
    assert "\n" not in str(found.value)


def test_4_bits_would_leave_a_mixture_as_it_is(folder):
    with pytest.raises(DataError, match="its experts, .* no linear layers, and --quant would leave them"):
        DeScore.load(folder, device="cpu", quant="4bit")
