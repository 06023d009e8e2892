"""A model on the disk: descore.json, descore.safetensors (query and head), a PEFT adapter or full
weights, and the tokenizer (docs/data.md, "A saved model"). Functions of a DeScore, `model`."""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from data import (
    DIMENSIONS,
    TAGS,
    DataError,
    Processor,
    VideoSettings,
    check_reader,
    error_context,
    make_instruction,
)
from support.above import from_above
from support.command import PeftModel, get_peft_model_state_dict
from support.digests import of_backbone
from support.files import (
    LAYOUTS,
    digest,
    head_file,
    local_folder,
    put_in_place,
    read_info,
    read_json,
)
from support.shard import whole

# By model_type what runs here, and of others that one may want what stands in the way (docs/scale.md).
BACKBONES = ("qwen3_vl", "qwen3_vl_moe")
OF_POSITIONS = ": its prompt does not say the seconds of frames, and its tower has no deepstack features"
OF_STATES = ": most of its layers keep a running state, which the CoTs behind one prompt cannot share"
OTHERS = {"qwen2_vl": OF_POSITIONS, "qwen2_5_vl": OF_POSITIONS,
          "qwen3_5": OF_STATES, "qwen3_5_moe": OF_STATES}
MOST_LAYERS = 1000  # a config.json with more is damaged, and making them would fill the memory


def load(cls, source: str | Path, dtype: torch.dtype | None, device: torch.device | str | None,
         video: dict | None, quant: str | None, reader: str, layout: str | None):
    """`DeScore.load`; cls is DeScore or a subclass."""
    check_reader(reader)
    if layout not in (None, *LAYOUTS):
        raise DataError(f"there is no scoring layout {layout!r}, but {' and '.join(LAYOUTS)}")
    directory = local_folder(source)
    if device is None:  # 0 is a device
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with error_context(f"{device}: no such device", RuntimeError):
        device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    # Whatever a damaged file makes other packages raise.
    with silence(), error_context(f"{directory}: no model can be loaded from it", Exception):
        info = read_info(directory)
        check_files(directory, info.pop("files", {}))
        is_adapter = "backbone" in info  # which names its backbone; full weights are one
        backbone = info.pop("backbone", str(directory if os.path.isdir(source) else source))
        known_backbone = info.pop("backbone_sha256", None)
        if is_adapter and (directory.resolve() / backbone).is_dir():  # ".." goes by where links lead
            backbone = os.path.normpath(directory.resolve() / backbone)
        elif is_adapter:
            local_folder(backbone, f"{directory / 'descore.json'}: \"backbone\" is to say where it is now: ")
        with error_context(f"{directory}: video settings that make no sense", TypeError):
            settings = VideoSettings(**info.pop("video", {}) | (video or {}))
            replace(settings, **info.get("scoring_video", {}))
        qwen, tokenizer = load_backbone(backbone, dtype, device, quant)
        backbone_sha256 = of_backbone(backbone)
        if is_adapter and known_backbone != backbone_sha256:
            blame_backbone(directory, backbone, known_backbone)
        vision = qwen.config.vision_config
        settings = replace(settings, patch_size=vision.patch_size,
                           temporal_patch_size=vision.temporal_patch_size,
                           merge_size=vision.spatial_merge_size)
        dimensions = info.pop("dimensions", DIMENSIONS)
        tags = info.pop("tags", TAGS)
        instruction = info.pop("instruction", make_instruction(dimensions, tags))
        processor = Processor(tokenizer, settings, instruction, dimensions, tags, reader)
        layout = layout or own_layout(directory, info, is_adapter)
        info.pop("scoring_layout", None)
        if layout == "release":
            cls = from_above("tools.release", "in_its_layout")(cls)
            info["scoring_layout"] = layout
        model = cls(qwen, processor, backbone)
        model.name, model.dtype, model.quant, model.info = str(source), dtype, quant, info
        model.backbone_sha256 = backbone_sha256
        load_rest(model, directory, is_adapter)
        if quant:  # its weights are on the device, and stay as they are
            model.query.data, model.head = model.query.data.to(device), model.head.to(device)
        else:
            model.to(device)
    if "note" in info:  # what whoever reads its scores is to know
        print(f"{directory}: {info['note']}", file=sys.stderr)
    return model.requires_grad_(False).eval()


@contextmanager
def silence():
    """Within it transformers and peft print nothing: what they would warn of is checked here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_backbone(name: str, dtype: torch.dtype, device: torch.device, quant: str | None):
    """A Qwen3-VL and its tokenizer from a directory or hub id. quant "4bit" keeps the language
    model's linear layers in NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""
    directory, options = local_folder(name), {"trust_remote_code": False}
    if (directory / "adapter_config.json").is_file():
        raise DataError(f"{directory}: an adapter, and no descore.json says on which backbone")
    if quant:
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=[r".*\.visual", "lm_head"])
        options |= {"quantization_config": nf4, "device_map": {"": device}}
    reason = f"{name}: no Qwen3-VL can be loaded from this directory or hub id"
    with error_context(reason, Exception):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if config.model_type not in BACKBONES:
            raise ValueError(f"it is a {config.model_type}{OTHERS.get(config.model_type, '')}")
        if quant and config.model_type == "qwen3_vl_moe":
            raise ValueError("its experts, which are most of its weights, are no linear layers, and "
                             "--quant would leave them as they are")
        layers = max(config.text_config.num_hidden_layers, config.vision_config.depth)
        if layers > MOST_LAYERS:
            raise ValueError(f"its config.json speaks of {layers} layers")
        if hasattr(config, "quantization_config"):
            if quant:
                raise ValueError("it is quantised already, which leaves --quant nothing to do")
            options["device_map"] = {"": device}
        else:
            for path in sorted(directory.glob("model*.safetensors")):
                tensor_names(path)
        try:
            qwen, names = AutoModelForImageTextToText.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, output_loading_info=True, **options)
        except RuntimeError as error:
            if "mismatched" in str(error):  # says no more, but that it was not ignored
                raise ValueError("its weights have other shapes than config.json says") from error
            raise
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    check_names(directory, lacking=names["missing_keys"], unused=names["unexpected_keys"])
    check_finite(directory, dict(qwen.named_parameters()))
    for parameter in qwen.parameters():
        if parameter.is_floating_point():  # quantised weights come with the types they were saved in
            parameter.data = parameter.data.to(dtype)
    for module in qwen.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of 4 bits; rules out gradients
            module.support_avx512bf16_for_cpu = False
    return qwen, tokenizer


def load_rest(model, directory: Path, is_adapter: bool) -> None:
    """What a saved model has beside its backbone: an adapter, the query, the head, and other
    weights that trained. is_adapter: whether it is one on a backbone elsewhere."""
    adapter = directory if is_adapter else directory / "lora_adapter"  # the release's stage 1
    if is_adapter or adapter.is_dir():
        load_adapter(model, adapter)
    path = directory / "descore.safetensors"
    if path.is_file() or is_adapter:
        load_own(model, path)
    elif head_file(directory).is_file():
        from_above("tools.release", "load_head")(model, head_file(directory))


def own_layout(directory: Path, info: dict, is_adapter: bool) -> str:
    """The layout in which a model scores unless told otherwise. A head of the release, which is
    read where there is no other (`load_rest`), was trained in the release's."""
    is_ours = is_adapter or (directory / "descore.safetensors").is_file()
    if head_file(directory).is_file() and not is_ours:
        return "release"
    return info.get("scoring_layout", "ours")


def check_files(directory: Path, sums: dict[str, str]) -> None:
    """Raises DataError if a file of a saved model is not as it was saved."""
    for name, wanted in sums.items():
        if not (directory / name).is_file():
            raise DataError(f"{directory / name}: no such file, and it was saved with the model")
        if digest(directory / name) != wanted:
            raise DataError(f"{directory / name}: not as it was saved. If it was changed on purpose, "
                            "take it from files in descore.json")


def blame_backbone(directory: Path, backbone: str, known: str | None) -> None:
    """Raises DataError for an adapter that knows another backbone than the one it is loaded on; one
    that was saved before adapters knew theirs is warned of."""
    if known is None:
        print(f"warning: {directory}: does not say what its backbone was like, so that nobody knows "
              f"whether {backbone} is still the same", file=sys.stderr)
        return
    was = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    raise DataError(f"{directory}: its adapter was trained on another backbone ({was}) than {backbone} "
                    "is now: config.json or weights differ")


def load_adapter(model, directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    for file in (directory / "adapter_config.json", path):
        if not file.is_file():
            raise DataError(f"{file}: no such file, and the model is an adapter")
    with error_context(f"{directory}: its adapter cannot be loaded on {model.source}", Exception):
        model.backbone = PeftModel.from_pretrained(model.qwen, str(directory))
        in_file = tensor_names(path)
        wanted = set(adapter_weights(model))
    check_names(path, lacking=wanted - in_file, unused=in_file - wanted)
    check_finite(path, adapter_weights(model))


def load_own(model, path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file, and the query vector and the head are in it")
    with error_context(f"{path}: cannot be read", Exception):
        tensor_names(path)
        weights = load_file(path)
    check_names(path, lacking=set(own_weights(model)) - set(weights), unused=())
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise DataError(f"{path}: {name} {tuple(tensor.shape)} does not fit {model.source}")
    check_finite(path, weights)
    model.load_state_dict(weights, strict=False)
    model.changed = set(weights)
    model.has_head = True


def tensor_names(path: Path) -> set[str]:
    """The names in a safetensors file. Raises DataError if a tensor is not of real numbers."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if (kind := file.get_slice(name).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                raise DataError(f"{path}: {name} is of type {kind}, no weight")
        return set(file.keys())


def check_names(place: Path, lacking: Iterable[str], unused: Iterable[str]) -> None:
    """Raises DataError if there are any such tensors: a model is whole, and nothing is left over."""
    for what, names in (("lacks", sorted(lacking)), ("has no place for", sorted(unused))):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise DataError(f"{place}: {what} {names[0]}{more}")


@torch.no_grad()
def check_finite(place: Path, weights: dict[str, torch.Tensor]) -> None:
    """Raises DataError if any of what was read there is NaN or infinite."""
    for name, tensor in weights.items():  # to look at the extremes is much faster than at each
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise DataError(f"{place}: {name} holds values that are not finite")


def own_weights(model) -> dict[str, torch.Tensor]:
    """Query and head."""
    return {"query": model.query} | {f"head.{name}": p for name, p in model.head.named_parameters()}


def adapter_weights(model) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model.backbone, adapter_name="default",
                                     save_embedding_layers=False)


def save(model, directory: Path, write: bool) -> None:
    """Write a model, safetensors and JSON only, beside its place, and rename it into it: the
    directory is complete or absent. Of a sharded model all ranks take part, one is to `write`."""
    adapted, weights = isinstance(model.backbone, PeftModel), {}
    if not adapted:
        for name, parameter in model.qwen.state_dict().items():
            gathered = whole(parameter)
            if write:  # others help to gather, and keep nothing
                weights[name] = gathered
    if not write:
        return
    beside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    processor = model.processor
    info = model.info | {"video": asdict(processor.settings), "instruction": processor.instruction,
                         "dimensions": processor.dimensions, "tags": processor.tags}
    own = own_weights(model) if model.has_head else {}
    if adapted:
        local = os.path.isdir(model.source)
        info["backbone"] = os.path.relpath(model.source, directory.resolve()) if local else model.source
        if model.backbone_sha256:
            info["backbone_sha256"] = model.backbone_sha256
        # Mergers, say, that train or have trained in an earlier stage. LoRA's are in the adapter.
        for name, parameter in model.named_parameters():
            trains = parameter.requires_grad and ".lora_" not in name
            if trains or name in model.changed:
                own[name] = parameter
        adapter = {name: tensor.contiguous() for name, tensor in adapter_weights(model).items()}
        save_file(adapter, beside / "adapter_model.safetensors")
        config = model.backbone.peft_config["default"]
        config.base_model_name_or_path = info["backbone"]
        config.save_pretrained(beside)
    else:
        model.qwen.save_pretrained(beside, state_dict=weights)
    if own:
        own = {name: tensor.detach().contiguous() for name, tensor in own.items()}
        save_file(own, beside / "descore.safetensors")
    processor.tokenizer.save_pretrained(beside)
    info["files"] = {path.name: digest(path) for path in sorted(beside.iterdir())}
    text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
    (beside / "descore.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    put_in_place(beside, directory)
