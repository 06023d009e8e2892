"""The embedded backbone as a Qwen3-VL-MoE: in each layer but one some experts stand for its MLP, each a
little off it, so that it still writes CoTs. Its file holds them as those on the hub do, transposed."""

import json

import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

EXPERTS, DENSE = 4, 1  # experts of a layer; the layer that has none


def write(folder, chosen=2):
    """Write it, with the embedded tokenizer; returns the folder. chosen: how many experts a token has."""
    toy = ROOT / "toy/backbone"
    config = json.loads((toy / "config.json").read_text())
    text = config["text_config"]
    config |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    config["vision_config"]["model_type"] = "qwen3_vl_moe_vision"
    text |= {"model_type": "qwen3_vl_moe_text", "num_experts": EXPERTS, "num_experts_per_tok": chosen,
             "moe_intermediate_size": text["intermediate_size"], "mlp_only_layers": [DENSE]}
    weights = {name: tensor.float() for name, tensor in load_file(toy / "model.safetensors").items()}
    torch.manual_seed(0)

    def experts(tensor):
        copies = tensor.expand(EXPERTS, *tensor.shape)
        return copies + 0.3 * tensor.std() * torch.randn(copies.shape)

    for layer in range(text["num_hidden_layers"]):
        if layer == DENSE:
            continue
        place = f"model.language_model.layers.{layer}.mlp"
        gate, up, down = (experts(weights.pop(f"{place}.{name}_proj.weight"))
                          for name in ("gate", "up", "down"))
        both = torch.cat([gate, up], 1)  # (experts, 2 · intermediate, hidden)
        weights[f"{place}.experts.gate_up_proj"] = both.transpose(1, 2).contiguous()
        weights[f"{place}.experts.down_proj"] = down.transpose(1, 2).contiguous()
        weights[f"{place}.gate.weight"] = torch.randn(EXPERTS, text["hidden_size"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    shown = json.loads((toy / "descore.json").read_text())  # the toy's frames and instruction
    shown = {name: shown[name] for name in ("video", "instruction", "dimensions")}
    (folder / "descore.json").write_text(json.dumps(shown))
    AutoTokenizer.from_pretrained(toy).save_pretrained(folder)
    return folder
