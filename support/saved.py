"""A model on the disk: descore.json, descore.safetensors (query and head), a PEFT adapter or full
weights, and the tokenizer (README, "A saved model"). Functions of a DeScore, `model`."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, Qwen3VLForConditionalGeneration

from data import DataError, explained
from support import release
from support.command import PeftModel, get_peft_model_state_dict
from support.files import local_folder, put_in_place
from support.shard import whole


def load_backbone(name: str, dtype: torch.dtype, device: torch.device, quant: str | None):
    """A Qwen3-VL and its tokenizer from a directory or hub id. quant "4bit" keeps the language
    model's linear layers in NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""
    directory, options = local_folder(name), {}
    if quant:
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=[r".*\.visual", "lm_head"])
        options = {"quantization_config": nf4, "device_map": {"": device}}
    reason = f"{name}: no Qwen3-VL can be loaded from this directory or hub id"
    with explained(reason, OSError, ValueError, SafetensorError):
        kind = AutoConfig.from_pretrained(directory).model_type
        if kind != "qwen3_vl":
            raise ValueError(f"it is a {kind}")
        qwen = Qwen3VLForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    for module in qwen.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of 4 bits; rules out gradients
            module.support_avx512bf16_for_cpu = False
    return qwen, tokenizer


def load_rest(model, directory: Path, is_adapter: bool) -> None:
    """What a saved model has beside its backbone: an adapter, the query, the head, and other
    weights that trained. is_adapter: whether it is one on a backbone elsewhere."""
    if (directory / "adapter_config.json").is_file():
        if not (directory / "adapter_model.safetensors").is_file():
            raise DataError(f"{directory}: it has adapter_config.json but no "
                            "adapter_model.safetensors")
        reason = f"{directory}: its adapter cannot be loaded on {model.source}"
        with explained(reason, OSError, ValueError, TypeError, RuntimeError, SafetensorError):
            model.backbone = PeftModel.from_pretrained(model.qwen, str(directory))
    path = directory / "descore.safetensors"
    if path.is_file():
        with explained(f"{path}: cannot be read", OSError, SafetensorError):
            weights = load_file(path)
        own = model.state_dict()
        for name, tensor in weights.items():
            if name not in own or own[name].shape != tensor.shape:
                raise DataError(f"{path}: {name} {tuple(tensor.shape)} does not fit {model.source}")
        model.load_state_dict(weights, strict=False)
        model.changed = set(weights)
    elif is_adapter:
        raise DataError(f"{path}: the query vector and the head are missing")
    if (directory / "rm_head.pth").is_file():
        release.load_head(model, directory / "rm_head.pth")


def save(model, directory: Path, write: bool) -> None:
    """Write a model, safetensors and JSON only, beside its place, and rename it into it: the
    directory is complete or absent. Of a sharded model all ranks take part, one is to `write`."""
    adapted, weights = isinstance(model.backbone, PeftModel), {}
    if not adapted:
        weights = {name: whole(p) for name, p in model.qwen.state_dict().items()}
    if not write:
        return
    beside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    processor = model.processor
    info = model.info | {"video": asdict(processor.settings), "instruction": processor.instruction,
                         "dimensions": processor.dimensions}
    own = {"query": model.query} | {f"head.{name}": p for name, p in model.head.named_parameters()}
    if adapted:
        local = os.path.isdir(model.source)
        info["backbone"] = os.path.relpath(model.source, directory.resolve()) if local else model.source
        # Mergers, say, that train or have trained in an earlier stage. LoRA's are in the adapter.
        for name, parameter in model.named_parameters():
            trains = parameter.requires_grad and ".lora_" not in name
            if trains or name in model.changed:
                own[name] = parameter
        adapter = get_peft_model_state_dict(model.backbone, adapter_name="default",
                                            save_embedding_layers=False)
        adapter = {name: tensor.contiguous() for name, tensor in adapter.items()}
        save_file(adapter, beside / "adapter_model.safetensors")
        config = model.backbone.peft_config["default"]
        config.base_model_name_or_path = info["backbone"]
        config.save_pretrained(beside)
    else:
        model.qwen.save_pretrained(beside, state_dict=weights)
    own = {name: tensor.detach().contiguous() for name, tensor in own.items()}
    save_file(own, beside / "descore.safetensors")
    processor.tokenizer.save_pretrained(beside)
    text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
    (beside / "descore.json").write_text(text, encoding="utf-8")
    put_in_place(beside, directory)
