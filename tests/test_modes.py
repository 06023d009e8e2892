"""What a model is made to be: whole or an adapter, in 4 bits or all, what of it trains, and in what mode it
works. The names of the embedded backbone's parts are written here, not taken from a model."""

import json
from itertools import product

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import ROOT
from counting import counted
from peft import PeftModel
from safetensors.torch import load_file

import coldstart
from model import DeScore
from support.ranks import ALONE
from support.run import prepare

BACKBONE = ROOT / "toy/backbone"
LAYERS = [f"model.language_model.layers.{n}" for n in range(5)]
BLOCKS = [f"model.visual.blocks.{n}" for n in range(4)]
PLACES = ["model.visual.merger", *(f"model.visual.deepstack_merger_list.{n}" for n in range(2))]
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")  # seven a layer
NORMS = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")


def named(places, parts, kinds):
    return {".".join(name) for name in product(places, parts, kinds)}


OWN = {"query", "head.weight"}
ADAPTED = {f"{layer}.{part}" for layer in LAYERS for part in LINEAR}
LORA = {f"{name}.lora_{side}.weight" for name in ADAPTED for side in "AB"}
LANGUAGE = named(LAYERS, LINEAR + NORMS, ["weight"]) | {
    "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}  # lm_head is the first
MERGERS = named(PLACES, ("norm", "linear_fc1", "linear_fc2"), ("weight", "bias"))
TOWER = named(BLOCKS, ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"),
              ("weight", "bias"))
TOWER |= {"model.visual.patch_embed.proj.weight", "model.visual.patch_embed.proj.bias",
          "model.visual.pos_embed.weight"}


def plain(name):
    """The name of a parameter without what is wrapped around the backbone, and without an adapter's name."""
    return name.removeprefix("backbone.").removeprefix("base_model.model.").replace(".default.", ".")


def load(**options) -> DeScore:
    torch.manual_seed(0)
    return DeScore.load(BACKBONE, device="cpu", **options)


def disturb(model):
    """Let nothing that trains be as it was made."""
    torch.manual_seed(3)
    for parameter in model.trainable().values():
        parameter.data.add_(torch.randn_like(parameter) * 0.03)


def batch_of(model, keys):
    return model.processor.collate([model.processor(*key) for key in keys])


def two_cots(model, B):
    """Two CoTs for each of B videos, (B, 2, 4) and their mask."""
    tokens = torch.arange(8 * B).view(B, 2, 4) + 20
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 1, 2:] = False
    return tokens, mask


# ------------------------------------------------------------------------------------------------------------
# What trains


@pytest.mark.parametrize("rank, quant", [(4, None), (0, None), (4, "4bit")])
def test_what_trains_is_what_the_flags_say(rank, quant):
    """In this order each flag is also taken back."""
    model = load(quant=quant)
    assert not model.trainable() and not model.training
    for merger, vision in ((True, True), (False, True), (True, False), (False, False)):
        model.set_trainable(rank, train_merger=merger, train_vision=vision)
        expected = OWN | (LORA if rank else LANGUAGE)
        expected = expected | (MERGERS if merger else set()) | (TOWER if vision else set())
        found = [plain(name) for name in model.trainable()]
        assert set(found) == expected and len(found) == len(expected), (merger, vision)
        assert model.tower_trains == (merger or vision)
    every = {plain(name).replace(".base_layer.", ".") for name, _ in model.named_parameters()}
    assert every == OWN | LANGUAGE | MERGERS | TOWER | (LORA if rank else set())


@pytest.mark.parametrize("rank, quant", [(4, None), (0, None), (4, "4bit")])
def test_what_trains_is_float32_and_what_is_frozen_as_it_was_loaded(rank, quant):
    model = load(dtype=torch.bfloat16, quant=quant)
    packed = {f"{name}.weight" for name in ADAPTED} if quant else set()

    def check(trains):
        for name, parameter in model.named_parameters():
            name = plain(name).replace(".base_layer.", ".")
            frozen = torch.uint8 if name in packed else torch.bfloat16
            expected = torch.float32 if name in OWN | trains else frozen
            assert parameter.dtype == expected and parameter.requires_grad == (name in trains), name

    check(set())  # a query and a head are float32 from the first
    model.set_trainable(rank, train_merger=True)
    check(OWN | MERGERS | (LORA if rank else LANGUAGE))


def test_lora_adapts_seven_linear_layers_a_block(keys, tmp_path):
    model = load()
    model.has_head = True
    before = model.score(batch_of(model, keys), ["a red circle", None, ""])
    model.set_trainable(4)
    assert torch.equal(model.score(batch_of(model, keys), ["a red circle", None, ""]), before)
    model.save(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {plain(name) for name in weights} == LORA and len(weights) == 2 * 7 * 5
    for name, weight in weights.items():
        assert weight.any() == ("lora_A" in name)  # B is 0: at first an adapter changes nothing
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    asked = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "modules_to_save": None,
             "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    assert {name: config[name] for name in asked} == asked


def test_rank_0_merges_the_adapter_that_is_there(model, keys, tmp_path):
    """In float64: 2e-6 at most were seen, as RMSNorm is computed in float32."""
    model.set_trainable(4, train_merger=True)
    disturb(model)
    model = model.double()
    cots = ["a red circle", None, "moves left"]
    before = model.score(batch_of(model, keys), cots)
    with model.backbone.disable_adapter():
        without = model.score(batch_of(model, keys), cots)
    model.set_trainable(0)
    after = model.score(batch_of(model, keys), cots)
    torch.testing.assert_close(after.double(), before.double(), rtol=0, atol=3e-5)
    assert (without - before).abs().min() > 3e-3
    assert not any("lora" in name for name, _ in model.named_modules())
    assert {plain(name) for name in model.trainable()} == OWN | LANGUAGE
    model = model.float().eval()
    model.save(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    again = DeScore.load(tmp_path / "merged", device="cpu")
    assert torch.equal(again.score(batch_of(model, keys), cots), model.score(batch_of(model, keys), cots))


# ------------------------------------------------------------------------------------------------------------
# Four bits, and half of the bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bits_are_nf4_of_the_language_models_linear_layers(dtype):
    """With double quantisation; all else is as in the backbone, and computed with in the same type."""
    small = dict(load(dtype=dtype, quant="4bit").qwen.named_modules())
    whole = load(dtype=dtype).qwen
    quantised = {name for name, part in small.items() if isinstance(part, bitsandbytes.nn.Linear4bit)}
    assert quantised == ADAPTED
    for name in ADAPTED:
        part = small[name]
        original = whole.get_submodule(name).weight.data
        values = dequantize_4bit(part.weight.data, part.weight.quant_state)
        for kind, double in product(("nf4", "fp4"), (True, False)):
            expected = dequantize_4bit(*quantize_4bit(original, quant_type=kind, compress_statistics=double))
            assert torch.equal(values, expected) == ((kind, double) == ("nf4", True)), (name, kind, double)
        assert part.compute_dtype == values.dtype == dtype
    for name, weight in whole.named_parameters():
        place, _, kind = name.rpartition(".")
        if place not in ADAPTED:
            assert torch.equal(small[place]._parameters[kind], weight), name


@pytest.mark.parametrize("rank, quant", [(4, None), (0, None), (4, "4bit")])
def test_a_model_in_16_bits_computes_in_them_whatever_trains(rank, quant, keys):
    """And what the head says and log-probabilities are float32."""
    seen = set()

    def note(part, given, out):
        seen.add(out.dtype)

    for dtype in (torch.bfloat16, torch.float32):
        model = load(dtype=dtype, quant=quant)
        model.set_trainable(rank, train_merger=True, train_vision=True)
        for name, part in model.qwen.named_modules():
            if name.endswith(("q_proj", "attn.qkv", "merger.linear_fc2", "lm_head")):
                part.register_forward_hook(note)
        seen.clear()
        thoughts = model.think(batch_of(model, keys[:1]), 2, 2)
        logps, scores = model.group(batch_of(model, keys[:1]), thoughts.tokens, thoughts.mask)
        assert seen == {dtype}
        assert {x.dtype for x in (logps, scores, thoughts.logps, thoughts.scores)} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------
# In what mode it works


@pytest.mark.parametrize("rank, vision, tower", [(4, True, 4), (0, False, 0)])
def test_a_backward_computes_layers_again_where_it_is_asked_to(rank, vision, tower, keys):
    """The tower's where it trains. Also after thinking, which leaves training mode and enters it again."""
    gradients = []
    for on in (True, False):
        model = load()
        model.set_trainable(rank, train_vision=vision)
        args = coldstart.Args(lora_rank=rank, gradient_checkpointing=on)
        prepare(model, args, ALONE)
        model.train()
        thoughts = model.think(batch_of(model, keys[:2]), 2, 3, seeds=[0, 1])
        assert not thoughts.scores.requires_grad
        records = []
        with counted(records.append):
            model.score(batch_of(model, keys[:2]), ["a red circle", None]).sum().backward()
            logps, scores = model.group(batch_of(model, keys[:2]), *two_cots(model, 2))
            (logps.sum() + scores.sum()).backward()
        again = [record for record in records if record["what"] == "backward"]
        assert again == [{"what": "backward", "language": 5 * on, "tower": tower * on}] * 2
        gradients.append({name: p.grad for name, p in model.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [4, 0])
def test_it_thinks_in_evaluation_mode_and_goes_back_to_its_own(rank, keys):
    model = load()
    model.set_trainable(rank)
    disturb(model)  # an adapter as it is made adds nothing that could be dropped
    modes = []
    for name, part in model.qwen.named_modules():
        if name.endswith("mlp"):
            part.register_forward_hook(lambda part, given, out: modes.append(part.training))
    scores = []
    for training in (True, False):
        model.train(training)
        modes.clear()
        model.think(batch_of(model, keys[:1]), 2, 3, seeds=[0], without_cot=True)
        assert modes and not any(modes)
        assert {part.training for part in model.modules()} == {training}
        modes.clear()
        scores.append(model.score(batch_of(model, keys), ["a red circle", None, ""]))
        assert modes and set(modes) == {training}
    assert torch.equal(*scores)  # nothing is dropped while it trains


def test_what_the_tower_makes_has_gradients_where_it_trains(keys):
    model = load()
    for merger, vision in ((True, True), (False, True), (True, False), (False, False)):
        model.set_trainable(4, merger, vision)
        features, deepstack = model.encode(batch_of(model, keys[:1])).features
        assert {part.requires_grad for part in (features, *deepstack)} == {merger or vision}
        with torch.no_grad():
            features, _ = model.encode(batch_of(model, keys[:1])).features
        assert not features.requires_grad


# ------------------------------------------------------------------------------------------------------------
# π_ref


def test_what_trains_goes_on_training_though_a_second_adapter_freezes_it(monkeypatch):
    """As with peft 0.18, which leaves nothing but adapters to train."""
    add = PeftModel.add_adapter

    def add_and_freeze(backbone, *given):
        add(backbone, *given)
        for name, parameter in backbone.named_parameters():
            if ".lora_" not in name:
                parameter.requires_grad_(False)

    monkeypatch.setattr(PeftModel, "add_adapter", add_and_freeze)
    model = load()
    model.set_trainable(4, train_merger=True)
    trains = set(model.trainable())
    model.keep_reference()
    assert set(model.trainable()) == trains and any(".merger." in name for name in trains)


def test_the_reference_of_an_adapter_is_one_more_adapter_and_shares_the_rest(keys):
    model = load()
    model.set_trainable(4, train_merger=True)
    disturb(model)
    before = dict(model.named_parameters())
    trains = set(model.trainable())
    model.keep_reference()
    assert model.reference is None and set(model.trainable()) == trains
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    new = {name: parameter for name, parameter in after.items() if name not in before}
    assert {plain(name).replace(".reference.", ".") for name in new} == LORA
    for name, parameter in new.items():
        own = before[name.replace(".reference.", ".default.")]
        assert torch.equal(parameter, own) and parameter.data_ptr() != own.data_ptr()
        assert not parameter.requires_grad

    def logps():
        return model.reference_logps(batch_of(model, keys[:1]), *two_cots(model, 1))

    first = logps()
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if ".lora_" in name:
                parameter.mul_(1.5)
    assert torch.equal(logps(), first) and set(model.trainable()) == trains
    with torch.no_grad():
        model.qwen.model.visual.merger.linear_fc2.weight.mul_(1.5)
    assert (logps() - first).abs().max() > 1e-3


def test_the_reference_of_a_whole_model_shares_what_is_frozen_alone_and_has_its_type(keys):
    model = load(dtype=torch.bfloat16)
    model.set_trainable(0, train_merger=True)
    trains = set(model.trainable())
    model.keep_reference()
    model.train()
    assert {p.dtype for p in model.reference.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.reference.parameters())
    assert not any(part.training for part in model.reference.modules())
    of_reference = {p.data_ptr() for p in model.reference.parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr() in of_reference) is (name not in trains), name
    logps = model.reference_logps(batch_of(model, keys[:1]), *two_cots(model, 1))
    assert logps.isfinite().all() and not logps.requires_grad
