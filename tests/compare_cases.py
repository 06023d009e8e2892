"""What tests/compare_trees.py runs in both trees.

A case is one command a line. Before a command may stand ranks=2 (so many processes in a group), die=PLACE and
stop=PLACE (kill -9 and SIGTERM at the moment at which a file is renamed to PLACE) and NAME=VALUE of the
environment. "&" keeps a command running until the case ends; $URL is then the address that it printed.
"$ …" is for the shell, "api …" and "endpoint …" call functions of compare_inputs.py, "like A B" compares two
folders within each tree. DATA is the folder of the inputs.
"""

# What differs on purpose: case and file (patterns), reason.
DELIBERATE: list[tuple[str, str, str]] = [
    ("help", "*.out", "one function declares how to think for five commands; stage 1 has no --mask"),
    ("coldstart-expected", "*", "the expectation over the mask is experiments/paradigms.py expected"),
    ("*-shards*", "run/checkpoints/*", "a checkpoint holds whole tensors, in one file"),
    ("*-shards*", "*.err", "a score is no view any more, of which FSDP warned"),
    ("*-shards*", "run/metrics.jsonl", "grad_norm: torch's own norm of shards, in float32"),
    ("*", "run/skipped.jsonl", "a pair is named by its row"),
    ("errors-stages", "9.out", "test sets are read before anything is said of the training pairs"),
]
# Lines that stand in one tree alone, on purpose: a run says what LoRA leaves out and what the model brings of
# its own; a page shows further figures of a record.
DROPPED = (r"LoRA leaves as they are, .*|\S+ is asked with an instruction of its own|"
           r"\S+ has dimensions of its own: .*|.*Object\.entries\(found\.further.*")
GONE = {"mask"}  # settings that NEW has no longer
# Files that have moved to another folder; texts in which only the folder differs are equal.
MOVED = (r"\b(support|tools)(?=[./](adapters|annotate|check|client|convert|filter|forgiving|formats|memory|"
         r"page|pairs|probe|report|requirements|serve|together|trackers)\b)")

# ------------------------------
# The cases

SMALL = "--min-pixels 4096 --max-pixels 4096 --lora-rank 4 --lr 1e-2 --workers 0"
COLD = ("coldstart.py --model DATA/backbone --train DATA/world/train_cots.jsonl --out run --epochs 1 "
        f"--batch-size 3 --max-new-tokens 30 {SMALL}")
RL = ("rl.py --model DATA/model --train DATA/world/train.jsonl --out run --steps 3 --batch-size 2 "
      f"--updates 2 --group-size 3 --length-low 15 --length-high 35 --max-new-tokens 40 {SMALL}")
SHARDS = "--lora-rank 0 --shard full --lr 1e-3 --max-new-tokens 12 --save-every 1"
TEST = "--test DATA/world/test_id.jsonl"
LISTS = "--root DATA/world --test DATA/lists/videoalign.csv --label VQ"
SEEN = "--fps 1 --min-pixels 9000 --max-pixels 20000"
PRESET = "--shard none --lr 1e-3 --max-new-tokens 30 --min-pixels 4096 --max-pixels 4096"
RL_PRESET = f"{RL} {PRESET} --lora-rank 0 --steps 1"
VIDEO = "DATA/world/videos/test_id_00000_a.mp4"
VIDEOS = f"{VIDEO} DATA/world/videos/test_id_00000_b.mp4"
PROMPT = "'A red circle moves left, at night.'"
JUDGE = "infer.py --model DATA/model --max-new-tokens 120"
BROKEN = "DATA/world/test_broken.jsonl"
ANNOTATE = "-m support.annotate DATA/world/test_id.jsonl out.jsonl"
API = "--api $URL/v1 --api-model judge"
PAIRS = "-m support.pairs DATA/groups.jsonl out.jsonl --model DATA/model --max-new-tokens 110"
PROBE = "-m support.probe DATA/world/test_id.jsonl --model DATA/model --max-new-tokens 110"
SERVE = "-m support.serve --model DATA/model --port 0 --max-new-tokens 25"
COMMANDS = ["coldstart.py", "rl.py", "infer.py"] + [f"-m support.{name}" for name in (
    "annotate", "filter", "check", "convert", "pairs", "probe", "report", "serve")]


def resumed(name: str, command: str, ranks: str = "") -> dict[str, str]:
    """A run, and the same killed and stopped in its middle, each of which is to end as the first."""
    again = f"{ranks} {command}\nlike ../{name}/run run"
    return {name: f"{ranks} {command}", f"{name}-killed": f"{ranks} die=step-2 {command}\n{again}",
            f"{name}-stopped": f"{ranks} stop=step-1 {command}\n{again}"}


def on_tables(command: str) -> str:
    return "\n".join(command.replace("KIND", kind) for kind in (
        "videoalign", "genai", "stage1", "stage2", "evaluation"))


CASES = {name: [line.strip() for line in text.strip().splitlines()] for name, text in {
    "help": "\n".join(f"{command} --help" for command in COMMANDS),
    # ---- stage 1
    **resumed("coldstart", f"{COLD} {TEST} --save-every 1"),
    **resumed("coldstart-ranks", f"{COLD} {TEST} --save-every 1", "ranks=2"),
    **resumed("coldstart-shards", f"{COLD} {SHARDS}", "ranks=2"),
    "coldstart-schedule": f"""
        {COLD} {TEST} DATA/world/test_ood.jsonl --backbone DATA/model --seed 5 --head-lr 3e-3 \
        --warmup 0.7 --weight-decay 0.5 --max-grad-norm 0.3 --mask-p 0.3 --epochs 2 --max-tokens 700 \
        --save-every 1 --keep 3 --keep-rollouts 2 --eval-every 2 --eval-temperature 0.5 --eval-tokens 900 \
        --no-eval-before \
        --no-gradient-checkpointing --reader decord --workers 1 --log tensorboard""",
    "coldstart-inputs": f"""
        {COLD} --train DATA/lists/stage1.csv {LISTS} {SEEN} --instruction DATA/ask.txt --think-tokens 700 \
        --eval-before false --gradient-checkpointing false
        {COLD} --train DATA/lists/stage1.csv {LISTS} --max-prompt 463 --max-skipped 0.7 --resume false""",
    "coldstart-vision": f"{COLD} --train-vision true --no-train-merger",
    "coldstart-merger": f"{COLD} --train-merger false --keep 1 --save-every 1",
    "coldstart-whole": f"{COLD} --lora-rank 0 --optim adamw8bit --lr 1e-3",
    "coldstart-4bit": f"{COLD} --quant 4bit --optim adamw8bit --save-every 0",
    "coldstart-expected": f"{COLD} --mask expected --mask-p 0.3",
    "coldstart-unreadable": f"""
        {COLD} --train DATA/world/broken.jsonl
        {COLD} --train DATA/world/broken.jsonl --max-skipped 0.4 --resume false --test {BROKEN}""",
    "coldstart-resume": f"""
        $ cp DATA/world/train_cots.jsonl train.jsonl
        {COLD} --train train.jsonl --root DATA/world --save-every 1
        {COLD} --train train.jsonl --root DATA/world --save-every 1
        {COLD} --train train.jsonl --root DATA/world --lr 2e-3
        $ sed -i s/seen/watched/ train.jsonl; rm -r run/checkpoints/step-3 run/model
        {COLD} --train train.jsonl --root DATA/world --resume true
        {COLD} --train train.jsonl --root DATA/world --resume insist
        {COLD} --train train.jsonl --root DATA/world --resume false --seed 3
        $ rm -r run/checkpoints
        {COLD} --train train.jsonl --root DATA/world""",
    "coldstart-paper": f"{COLD} --preset presets/paper.json {PRESET}",
    "coldstart-release": f"{COLD} --preset presets/release.json {PRESET}",
    "coldstart-moved": f"{COLD} --preset support/release.json {PRESET}",
    "coldstart-strict": f"{COLD} --preset presets/strict.json {PRESET}",
    "coldstart-preset": f"""
        coldstart.py --preset DATA/own.json {TEST} --head-lr none --train DATA/world/train_cots.jsonl""",
    "coldstart-embedded": f"""
        $ mkdir runs; cp -r DATA/world runs/toy
        coldstart.py --epochs 1 --out run --max-new-tokens 20 --batch-size 6 {TEST}""",
    # ---- stage 2
    **resumed("rl", f"{RL} {TEST} --save-every 1"),
    **resumed("rl-ranks", f"{RL} {TEST} --save-every 1", "ranks=2"),
    **resumed("rl-shards", f"{RL} {SHARDS}", "ranks=2"),
    "rl-schedule": f"""
        {RL} {TEST} DATA/world/test_ood.jsonl --backbone ../coldstart/run --seed 5 --weight-decay 0.5 \
        --max-grad-norm 0.3 --max-tokens 700 \
        --save-every 2 --keep 1 --keep-rollouts 2 --eval-every 2 --eval-temperature 0.5 \
        --think-tokens 900 --no-eval-before --no-gradient-checkpointing --reader decord --workers 1 \
        --log tensorboard --updates 1""",
    "rl-inputs": f"""
        {RL} --train DATA/lists/stage2.csv {LISTS} {SEEN} --instruction DATA/ask.txt --eval-tokens 700 \
        --eval-before false --gradient-checkpointing false --keep 3 --save-every 1
        {RL} --train DATA/lists/stage2.csv {LISTS} --max-prompt 463 --max-skipped 0.7 --resume false""",
    "rl-rewards": f"""
        {RL} --w-format 0.3 --w-quality 0.5 --w-length 0.4 --length-excess 36 --no-advantage-std \
        --reward DATA/reward.py:vowels=0.5 DATA/reward.py:quality_reward""",
    "rl-groups": f"""
        {RL} --reward DATA/reward.py:vowels=0.5 --reward none --reward DATA/reward.py:format_reward \
        --advantage-std false --group-size 4 --batch-size 3 --steps 2 --train DATA/world/train_cots.jsonl""",
    "rl-losses": f"""
        {RL} --loss-mean token --clip-low 0.01 --clip-high 0.02 --dual-clip 1.01 --log-ratio-bound 0.05 \
        --kl-bound 0.0005 --beta 0.1 --bt-weight 0.5 --bt-pairs all --temperature 1.3 --top-p 0.9""",
    "rl-truncated": f"{RL} --mask-truncated true --loss-mean constant --beta 0 --max-new-tokens 90",
    "rl-merger": f"{RL} --train-merger true",
    "rl-whole": f"{RL} --lora-rank 0 --optim adamw8bit --lr 1e-3",
    "rl-4bit": f"{RL} --quant 4bit --optim adamw8bit --save-every 0",
    "rl-unreadable": f"""
        {RL} --train DATA/world/broken.jsonl --batch-size 4
        {RL} --train DATA/world/broken.jsonl --batch-size 4 --max-skipped 0.4 --resume false \
        --test {BROKEN}""",
    "rl-resume": f"""
        $ cp DATA/reward.py reward.py
        {RL} --reward reward.py:vowels=0.5 --save-every 1
        {RL} --reward reward.py:vowels=0.5 --save-every 1 --steps 4
        $ sed -i s/aeiou/xyz/ reward.py; rm -r run/checkpoints/step-3
        {RL} --reward reward.py:vowels=0.5
        {RL} --reward reward.py:vowels=0.5 --resume insist
        {RL} --reward reward.py:vowels=0.5 --resume false --seed 3""",
    "rl-paper": f"{RL_PRESET} --preset presets/paper.json",
    "rl-release": f"{RL_PRESET} --preset presets/release.json",
    "rl-moved": f"{RL_PRESET} --preset support/release.json --dual-clip none --reward none",
    "rl-strict": f"{RL_PRESET} --preset presets/strict.json --lora-rank 4 --max-new-tokens 120",
    "rl-preset": "rl.py --preset DATA/own.json --train DATA/world/train.jsonl",
    "rl-untrained": f"{RL} --model DATA/backbone --steps 1",
    "rl-embedded": f"""
        $ mkdir runs; cp -r DATA/world runs/toy; cp DATA/world/train.jsonl runs/toy/train_scores.jsonl
        $ cp -r DATA/model runs/coldstart; cp -r DATA/backbone runs
        rl.py --steps 1 --batch-size 2 --group-size 3 --out run --max-new-tokens 20 --lora-rank 4 {TEST}""",
    # ---- infer
    "infer-one": f"""
        {JUDGE} {VIDEO} {PROMPT}
        {JUDGE} {VIDEO} {PROMPT} --json --report page.html
        {JUDGE} {VIDEO} {PROMPT} --max-new-tokens 7
        {JUDGE} DATA/world/videos/cut.mp4 {PROMPT}""",
    "infer-several": f"""
        {JUDGE} {VIDEOS} DATA/world/videos/cut.mp4 {PROMPT} --samples 3 --seed 4
        {JUDGE} {VIDEOS} {PROMPT} --json --temperature 0.8 --seed 4
        {JUDGE} {VIDEOS} {PROMPT} --report page.html --repetition-penalty 1.3
        {JUDGE} {VIDEOS} {PROMPT} --cot off --instruction DATA/ask.txt --reader decord""",
    "infer-pairs": f"""
        {JUDGE} --pairs {BROKEN} --out deep/p.jsonl --report page.html
        $ head -n 4 deep/p.jsonl > half.jsonl
        {JUDGE} --pairs {BROKEN} --out half.jsonl --json
        {JUDGE} --pairs DATA/world/test_id.jsonl --out deep/p.jsonl
        {JUDGE} --pairs {BROKEN} --out half.jsonl --seed 3 --temperature 0.5""",
    "infer-labels": f"""
        {JUDGE} --pairs DATA/lists/videoalign.csv --root DATA/world --label VQ --max-tokens 500 --workers 1
        {JUDGE} --pairs DATA/lists/videoalign.csv --root DATA/world --cot off --out p.jsonl
        {JUDGE} --pairs DATA/lists/videoalign.csv --root DATA/world --samples 2 --think-tokens 900""",
    "infer-instruction": f"""
        {JUDGE} --pairs DATA/world/problems.jsonl --instruction problem --report page.html
        {JUDGE} --pairs DATA/world/problems.jsonl --instruction DATA/ask.txt --out p.jsonl
        {JUDGE} --pairs DATA/world/problems.jsonl --instruction DATA/reward.py""",
    "infer-release": f"""
        {JUDGE} --pairs {BROKEN} --scoring-layout release --out p.jsonl
        {JUDGE} {VIDEOS} {PROMPT} --scoring-layout release --samples 2 --json
        {JUDGE} {VIDEOS} {PROMPT} --scoring-layout release --cot off
        infer.py --model DATA/actor {VIDEOS} {PROMPT} --max-new-tokens 15 --report page.html
        infer.py --model DATA/small_actor --pairs {BROKEN} --max-new-tokens 9 --out actor.jsonl
        infer.py --model DATA/small_actor {VIDEO} {PROMPT} --max-new-tokens 15 --scoring-layout ours""",
    "infer-models": f"""
        infer.py {VIDEO} {PROMPT} --max-new-tokens 9
        $ mkdir runs; cp -r DATA/model runs/coldstart; cp -r DATA/backbone runs
        infer.py {VIDEO} {PROMPT} --max-new-tokens 9
        infer.py --model DATA/backbone {VIDEO} {PROMPT}
        infer.py --model DATA/other {VIDEOS} {PROMPT} --max-new-tokens 30 --json
        infer.py --model ../rl/run {VIDEO} {PROMPT} --max-new-tokens 30
        infer.py --model ../rl-whole/run {VIDEO} {PROMPT} --max-new-tokens 30""",
    "infer-ranks": f"""
        ranks=2 {JUDGE} --pairs {BROKEN} --out p.jsonl --samples 2
        ranks=2 {PROBE} --limit 2 --samples 1
        ranks=2 {PAIRS}""",
    # ---- what stands around
    "annotate-model": f"""
        {ANNOTATE} --model DATA/backbone --max-new-tokens 120 --temperature 0.7 --seed 4 --scores
        {ANNOTATE} --model DATA/backbone --max-new-tokens 8 --scores
        -m support.annotate {BROKEN} broken.jsonl --model DATA/model --max-new-tokens 100 --temperature 0 \
        --think-tokens 500 {SEEN} --instruction DATA/ask.txt
        -m support.annotate DATA/world/test_id.jsonl decord.jsonl --model DATA/model --max-new-tokens 60 \
        --max-tokens 500 --reader decord""",
    "annotate-api": f"""
        endpoint plain &
        KEY=secret {ANNOTATE} {API} --api-key-env KEY --scores --max-new-tokens 77 --temperature 0.4
        OPENAI_API_KEY=own -m support.annotate {BROKEN} two.jsonl {API} --parallel 2 {SEEN} \
        --instruction DATA/ask.txt
        -m support.annotate {BROKEN} two.jsonl {API} {SEEN} --instruction DATA/ask.txt --reader decord""",
    "annotate-alone": f"""
        endpoint plain &
        {ANNOTATE} {API} --parallel 1""",
    "annotate-together": f"""
        endpoint together &
        {ANNOTATE} {API} --scores --together --seed 6
        -m support.annotate {BROKEN} two.jsonl {API} --scores --together --instruction DATA/together.txt
        -m support.filter out.jsonl filtered.jsonl""",
    "annotate-breaks": f"""
        endpoint breaks &
        {ANNOTATE} {API} --parallel 1 --retries 0
        {ANNOTATE} {API} --parallel 1 --temperature 0.5
        {ANNOTATE} {API} --parallel 1 --retries 1""",
    "annotate-slow": f"""
        endpoint slow &
        {ANNOTATE} {API} --parallel 1 --retries 0 --timeout 0.4""",
    "filter": """
        -m support.filter DATA/world/train_cots.jsonl cots.jsonl
        -m support.filter DATA/world/train.jsonl scores.jsonl
        -m support.filter DATA/other.jsonl other.jsonl --model DATA/other
        -m support.filter DATA/other.jsonl none.jsonl
        -m support.filter DATA/lists/stage1.csv missing.jsonl""",
    "check": f"""
        -m support.check DATA/lists/videoalign.csv --root DATA/world --label VQ {SEEN}
        -m support.check DATA/world/broken.jsonl --reader decord --min-pixels 4096
        -m support.check DATA/world/test_id.jsonl --model DATA/actor/huggingface --max-pixels 3000 \
        --min-pixels 256""",
    "convert": on_tables("-m support.convert DATA/lists/KIND.csv out/KIND.jsonl --root DATA/world") + """
        -m support.convert DATA/lists/videoalign.csv out/vq.jsonl --root DATA/world --label VQ
        -m support.convert DATA/world/broken.jsonl out/broken.jsonl""",
    "pairs": f"""
        {PAIRS} --take all --samples 3 --seed 2 --scores
        {PAIRS} --take all --samples 3 --seed 2 --margin 0.4
        {PAIRS} --samples 3
        $ rm *.judged
        {PAIRS} --temperature 0.6 --instruction DATA/ask.txt --workers 1
        $ rm *.judged
        {PAIRS} --repetition-penalty 1.4 --think-tokens 300 --reader decord
        {PAIRS} --repetition-penalty 1.4 --margin 9""",
    "probe": f"""
        {PROBE} --limit 2 --samples 2 --seed 3
        {PROBE} --json --samples 1 --temperature 0.7 --think-tokens 400 --limit 3
        -m support.probe DATA/lists/videoalign.csv --root DATA/world --label VQ --model DATA/model \
        --samples 1 --max-new-tokens 40 --instruction DATA/ask.txt --reader decord
        -m support.probe DATA/world/problems.jsonl --model DATA/model --instruction problem --limit 2 \
        --max-new-tokens 60
        -m support.probe {BROKEN} --model DATA/small_actor --samples 2 --max-new-tokens 9""",
    "report": """
        $ cp -r ../rl-schedule/run rl; cp -r ../coldstart/run cold
        -m support.report rl
        -m support.report cold --out pages/cold.html --workers 1 --reader decord
        -m support.report rl --png figures
        -m support.report DATA""",
    "serve": f"""
        {SERVE} --videos DATA/world --fps 4 --unusable -1 --window 0.3 --device cpu --host localhost &
        api frames $URL
        api files $URL
        api client $URL
        api arrays $URL
        api adapters $URL""",
    "serve-thoughts": f"""
        {SERVE} --samples 2 --temperature 0.7 --seed 5 --think-tokens 90 --reader decord --videos DATA/world &
        api arrays $URL
        api files $URL path""",
    "serve-scores": f"""
        {SERVE} --cot off &
        api client $URL
        api arrays $URL
        api files $URL""",
    "serve-limits": f"""
        {SERVE} --queue 1 --max-body 300000 --max-frames 10 --videos DATA/world &
        api files $URL
        api busy $URL""",
    "serve-pixels": f"""
        {SERVE} --max-pixels 4000 --max-new-tokens 5 --videos DATA/world &
        api files $URL""",
    "api": """
        api judge
        api reward
        api scorer""",
    # ---- what is refused
    "errors-stages": f"""
        {COLD} --batch-size 0
        {COLD} --mask-p 1.5
        {COLD} --instruction problem
        {COLD} --shard full
        {COLD} --train DATA/world/train.jsonl
        {COLD} --train DATA/world/none.jsonl
        {COLD} --nothing
        {COLD} --lora-rank 0 --quant 4bit
        {COLD} {TEST} DATA/world/./test_id.jsonl
        {COLD} --preset DATA/none.json
        {COLD} --preset DATA/ask.txt
        coldstart.py --train DATA/world/train_cots.jsonl --out run
        {RL} --length-low 50
        {RL} --reward DATA/reward.py:none=1
        {RL} --reward DATA/reward.py:vowels
        {RL} --reward DATA/reward.py:fails=1
        {RL} --top-p 0
        {RL} --lora-rank 8
        {RL} --log wandb
        {RL} --train DATA/lists/stage1.csv --root DATA/world
        {RL} --model DATA/none""",
    "errors": f"""
        infer.py {VIDEO}
        infer.py {VIDEOS}
        {JUDGE} --out p.jsonl {VIDEO} {PROMPT}
        {JUDGE} --samples 0
        {JUDGE} {VIDEO} {PROMPT} --repetition-penalty 1.2 --temperature 1
        {JUDGE} {VIDEO} {PROMPT} --report p.txt
        {ANNOTATE}
        {ANNOTATE} --model DATA/model --together
        {ANNOTATE} --api http://x/v1
        -m support.annotate DATA/world/test_id.jsonl DATA/world/test_id.jsonl --model DATA/model
        -m support.filter DATA/none.jsonl out.jsonl
        -m support.convert DATA/reward.py out.jsonl
        -m support.check DATA/lists/videoalign.csv --label XX
        -m support.report DATA --out page.txt
        -m support.pairs DATA/world/test_id.jsonl out.jsonl --model DATA/model
        -m support.probe DATA/none.jsonl --model DATA/model
        -m support.serve --videos DATA/none
        -m support.serve --model DATA/none --port 0""",
}.items()}
