"""One CUDA GPU at the 8B shape, random weights, real token counts: rollouts, update, memory, utilisation.

    python bench/gpu.py                                     # 8B, prompts of 5,000 tokens, 8 CoTs of 512
    python bench/gpu.py --size 20m --device cpu --video-tokens 300 --cot-tokens 16   # to try the script

Utilisation (MFU) counts 2 floating-point operations a parameter of the language model and token read,
attention's 4 · layers · heads · head size a pair of tokens that see each other, and as much again for the
backward (LoRA: frozen weights get no gradient of their own); what checkpointing computes twice counts once.
Over the GPU's dense bf16 peak (`--peak`, in TFLOP/s).
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import speed

from support.command import run_command
from support.run import checkpoint_activations


def clock(work, device: str, repeats: int) -> float:
    """Seconds of the quickest of some runs, after one to warm up."""
    best = float("inf")
    for turn in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn:
            best = min(best, time.perf_counter() - started)
    return best


def quantise(model) -> None:
    """Put the language model's linear layers in NF4, as DeScore.load(quant="4bit") does."""
    import bitsandbytes

    weights = {name: p.data for name, p in model.qwen.named_parameters()}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=model.dtype)
    replace_with_bnb_linear(model.qwen, modules_to_not_convert=[r".*\.visual", "lm_head"],
                            quantization_config=config)
    for name, module in model.qwen.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight = bitsandbytes.nn.Params4bit(weights.pop(f"{name}.weight").cpu(),
                                                       requires_grad=False,
                                                       quant_type="nf4", compress_statistics=True)
            module.to(model.query.device)
            module.support_avx512bf16_for_cpu = False
    model.quant = "4bit"


def measure(quant: bool, args) -> None:
    """Print the row of one kind of weights."""
    G, C, cuda = args.group_size, args.cot_tokens, args.device == "cuda"
    model = speed.make(args.size, args.device)
    text = model.qwen.config.text_config
    linear = sum(p.numel() for name, p in model.qwen.named_parameters() if "language_model.layers" in name)
    if quant:
        quantise(model)
    model.set_trainable(64)
    checkpoint_activations(model.qwen)
    batch = model.encode(speed.make_batch(model, 1, args.video_tokens))
    P = batch.input_ids.shape[1]
    speed.never_ends(model)
    thought = clock(lambda: model.think(batch, G, C, 1.0, seeds=[0]), args.device, args.repeats)
    tokens = torch.randint(0, 300, (1, G, C), device=args.device)
    tokens[tokens == model.processor.eos_id] = 0
    mask, advantages = torch.ones_like(tokens, dtype=torch.bool), torch.randn(1, G, device=args.device)
    old = torch.full(tokens.shape, -9.0, device=args.device)
    model.train()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(lambda: speed.update(model, batch, tokens, mask, old, advantages), args.device,
                    args.repeats)
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if cuda else "–"
    length = P + G * (C + 1)
    pairs = P * P / 2 + G * (P * C + C * C / 2)  # of tokens that see each other
    flop = 2 * linear * length + 2 * G * C * text.vocab_size * text.hidden_size
    flop += 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * pairs
    flop *= 2  # a backward through activations costs as much as a forward; recomputing does not count
    mfu = f"{flop / seconds / args.peak / 1e12:.1%}" if cuda else "–"
    weights = "4-bit" if quant else str(model.dtype).removeprefix("torch.")
    print(f"| {weights} + LoRA 64 | {P} | {G * C / thought:.0f} | {thought:.2f} | {seconds:.2f} | {mfu} "
          f"| {peak} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=speed.SIZES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--video-tokens", type=int, default=4800)
    parser.add_argument("--cot-tokens", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peak", type=float, default=989.0,
                        help="dense bf16 TFLOP/s; 989 is an H100's or H200's (SXM)")
    args = parser.parse_args()
    print(torch.cuda.get_device_name() if args.device == "cuda" else "CPU: to try the script, not to measure")
    print("| weights | prompt | rollout tokens/s | rollouts, s | update, s | update MFU | peak GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for quant in (False, True):
        measure(quant, args)


if __name__ == "__main__":
    run_command(main)
