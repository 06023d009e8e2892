"""A whole step of stage 2 against the GRPOTrainer of TRL, on the same language model with random weights.

    python3 -m venv ENV    # an environment of its own, with the torch of ours
    ENV/bin/pip install torch==2.13.0 trl peft datasets
    python bench/peer.py --python ENV/bin/python

Both let a group of rollouts be written for one prompt, read the reference policy's log-probabilities, and
update LoRA by GRPO with β > 0. Processes are started in pairs, ours and theirs, each for one step to warm up
and one that is timed; the ratio is that of the medians.

Not the same: ours also runs the vision tower (theirs has a Qwen3 of text, and as many tokens of it), scores
each rollout behind [Reward], and has L_BT. Theirs also decodes the rollouts, calls a reward and logs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
VIDEO_TOKENS, RANK = 1200, 16
BETA = 1e-5  # both need a reference; how large it is costs nothing


class Clock:
    """The seconds since it was started, of the wall and of the processor."""

    def start(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds = [end - start for start, end in zip(self.started, now)]


def ours(asked: dict, clock: Clock) -> None:
    """Time a step; the optimiser's included."""
    from step_profile import Step

    step = Step(argparse.Namespace(**asked, video_tokens=VIDEO_TOKENS, lora_rank=RANK))
    for _ in range(2):
        clock.start()
        step.read()
        step.think()
        step.refer()
        step.update()
        clock.stop()


def theirs(asked: dict, clock: Clock) -> None:
    """Time a step of GRPOTrainer, from its beginning to its end."""
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/backbone")
    text = " red" * asked["prompt"]
    ids = tokenizer(text)["input_ids"][: asked["prompt"]]
    prompt = tokenizer.decode(ids)
    assert len(tokenizer(prompt)["input_ids"]) == asked["prompt"]
    model = Qwen3ForCausalLM(Qwen3Config(
        **asked["shape"], tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None))

    class Timed(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.start()

        def on_step_end(self, *args, **kwargs):
            clock.stop()

    def reward(completions, **kwargs) -> list[float]:
        return [float(len(text)) for text in completions]

    G, C = asked["group_size"], asked["max_new_tokens"]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            max_steps=2, per_device_train_batch_size=G, num_generations=G, max_completion_length=C,
            generation_kwargs={"min_new_tokens": C}, temperature=1.0, beta=BETA, loss_type="grpo",
            save_strategy="no", logging_steps=1, disable_tqdm=True)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        GRPOTrainer(model, reward, config, Dataset.from_dict({"prompt": [prompt] * 2}),
                    processing_class=tokenizer, peft_config=lora, callbacks=[Timed()]).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="of the environment with TRL [this]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--asked", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        work, clock = {"ours": ours, "theirs": theirs}[args.run], Clock()
        work(args.asked, clock)
        return print(*clock.seconds)
    import speed

    hidden, layers, heads, kv, head, mlp, vocabulary, *_ = speed.SIZES["20m"]
    prompt = speed.make_batch(speed.make("20m", "cpu"), 1, VIDEO_TOKENS).input_ids.shape[1]
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
             "num_key_value_heads": kv, "head_dim": head, "intermediate_size": mlp, "vocab_size": vocabulary}
    asked = json.dumps({"size": "20m", "shape": shape, "prompt": prompt, "group_size": 8,
                        "max_new_tokens": 128})
    seconds = {"ours": [], "theirs": []}
    for _ in range(args.repeats):
        for who, python in (("ours", sys.executable), ("theirs", args.python)):
            command = [python, __file__, "--run", who, "--asked", asked]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            wall, cpu = (float(word) for word in done.stdout.split()[-2:])
            seconds[who].append((wall, cpu))
            print(f"{who} {wall:.2f} s, {cpu:.2f} s of the processor", flush=True)
    print(f"\nprompts of {prompt} tokens; {torch.get_num_threads()} threads\n\n"
          "| seconds | ours | theirs | ratio |\n| --- | ---: | ---: | ---: |")
    for number, clock in enumerate(("of the wall", "of the processor")):
        mine, other = (statistics.median(pair[number] for pair in seconds[who]) for who in seconds)
        print(f"| {clock} | {mine:.2f} | {other:.2f} | {other / mine:.2f} × |")


if __name__ == "__main__":
    main()
