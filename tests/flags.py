"""Every flag of every command, a value for it, and what must differ: the table of tests/test_flags.py.

RUNS are short runs, each with flags whose effects can be told apart. A row of TABLE has a flag with its
value, the run in which it stands, what it does, and a look at that run (tests/flag_looks.py). Where another
test pins a flag, its row names that test."""

from typing import Any, NamedTuple

import flag_looks as look

# ------------------------------------------------------------------------------------------------------------
# The runs: commands in which {data}, {world}, {out} and {run} are folders

SMALL = "--min-pixels 4096 --max-pixels 4096 --lora-rank 4 --lr 1e-3 --workers 0"
MODEL = "--model {data}/model"
COLD = "coldstart.py --train {data}/train.jsonl --out {out} --epochs 1 --mask-p 0"
RL = ("rl.py --train {data}/train.jsonl --out {out} --updates 1 --group-size 2 --max-new-tokens 30 "
      "--length-low 1 --length-high 99")
LOGS = ("--backbone {data}/model --batch-size 1 --seed 5 --save-every 1 --keep 3 "
        "--test {data}/test_a.jsonl {data}/test_b.jsonl --no-eval-before --eval-every 3 "
        "--eval-temperature 0.5 --eval-tokens 100000 --keep-rollouts 1 --no-gradient-checkpointing")
SEEN = ("--model {data}/model --train {data}/lists/train.jsonl --root {world} --lr 0 --batch-size 4 "
        "--test {data}/lists/test.csv --label VQ --instruction {data}/ask.txt --fps 1 --min-pixels 9000 "
        "--max-prompt {max_prompt} --max-skipped 0.9 --lora-rank 4 --max-new-tokens 5 --keep-rollouts 9 "
        "--workers 0 --eval-before false --think-tokens 1")
PARTS = "--lora-rank 0 --max-pixels 2500 --min-pixels 1024 --gradient-checkpointing false"
BITS = "--quant 4bit --optim adamw8bit --train-merger false --workers 1"
SHARDS = "--lora-rank 0 --shard full"
FAR = ("--steps 1 --batch-size 2 --updates 2 --group-size 4 --beta 1 --lr 0.003 "
       "--reward tests/recited.py:colons=1")
THINKS = "--temperature 0.8 --seed 4 --max-new-tokens 5 --think-tokens 1 --instruction {data}/ask.txt"
LISTED = "{data}/lists/test.csv --root {world} --label VQ"
JUDGED = "--out {out}/judged.jsonl"
ANNOTATED = "{data}/test_a.jsonl {out}/out.jsonl"
CHOSEN = "{data}/groups.jsonl {out}/pairs.jsonl"
FILTERED = "{data}/otherwise.jsonl {out}/kept.jsonl"

RUNS = {
    "cold": f"{COLD} {MODEL} {SMALL} --batch-size 4",
    "cold-logs": f"{COLD} {LOGS} {SMALL} --max-new-tokens 4",
    "cold-seen": f"{COLD} {SEEN} --max-tokens 1",
    "cold-parts": f"{COLD} {MODEL} {SMALL} {PARTS} --batch-size 4 --train-vision true --no-train-merger",
    "cold-bits": f"{COLD} {MODEL} {SMALL} {BITS} --batch-size 4 --log tensorboard",
    "cold-shards": f"ranks=2 {COLD} {MODEL} {SMALL} {SHARDS} --batch-size 4",
    "rl": f"{RL} {MODEL} {SMALL} --steps 1 --batch-size 4",
    "rl-logs": f"{RL} {LOGS} {SMALL} --steps 4",
    "rl-seen": f"{RL} {SEEN} --steps 1",
    "rl-parts": f"{RL} {MODEL} {SMALL} {PARTS} --steps 1 --batch-size 2 --train-merger true",
    "rl-bits": f"{RL} {MODEL} {SMALL} {BITS} --steps 1 --batch-size 2",
    "rl-shards": f"ranks=2 {RL} {MODEL} {SMALL} {SHARDS} --steps 1 --batch-size 2",
    "rl-far": f"{RL} {MODEL} {SMALL} {FAR}",
    "rl-bounds": f"{RL} {MODEL} {SMALL} {FAR} --log-ratio-bound 0.1 --kl-bound 0.00001",
    "infer": f"infer.py --pairs {LISTED} {MODEL} {JUDGED} --json --samples 2 {THINKS}",
    "infer-penalty": f"infer.py --pairs {{data}}/test_a.jsonl {MODEL} {JUDGED} --max-new-tokens 5 "
                     "--repetition-penalty 1.3 --scoring-layout release --max-tokens 100000",
    "infer-off": f"infer.py --pairs {{data}}/problems.jsonl {MODEL} {JUDGED} --cot off --instruction problem "
                 "--report {out}/page.html --workers 1",
    "annotate": f"-m tools.annotate {ANNOTATED} {MODEL} {THINKS} --fps 1 --min-pixels 9000 "
                "--max-pixels 20000",
    "annotate-pixels": f"-m tools.annotate {ANNOTATED} {MODEL} --min-pixels 1024 --max-pixels 2500 "
                       "--max-new-tokens 5 --max-tokens 100000",
    "pairs": f"-m tools.pairs {CHOSEN} {MODEL} --samples 2 {THINKS}",
    "pairs-penalty": f"-m tools.pairs {CHOSEN} {MODEL} --max-new-tokens 5 --repetition-penalty 1.3 "
                     "--workers 1",
    "probe": f"-m tools.probe {LISTED} {MODEL} --json --samples 2 {THINKS}",
    "probe-problem": f"-m tools.probe {{data}}/problems.jsonl {MODEL} --samples 1 --max-new-tokens 5 "
                     "--instruction problem --limit 1",
    "convert": "-m tools.convert {data}/lists/test.csv {out}/pairs.jsonl --root {world} --label VQ",
    "check": f"-m tools.check {LISTED} --fps 1 --min-pixels 9000 --model {{data}}/letters",
    "check-pixels": "-m tools.check {data}/test_a.jsonl --min-pixels 1024 --max-pixels 2500",
    "filter": f"-m tools.filter {FILTERED} --model {{data}}/other",
    "filter-plain": f"-m tools.filter {FILTERED}",
    "ties": f"experiments/paradigms.py ties {MODEL} {SMALL} --train {{data}}/train.jsonl --out {{out}} "
            "--epochs 1 --batch-size 4 --theta 2",
    "report": "-m tools.report {run} --out {out}/page.html --workers 1",
    "report-decord": "-m tools.report {run} --out {out}/page.html --reader decord",
}
# What make test leaves to make test-all: runs that show no number, or one that another shows as well.
SLOW_RUNS = {"cold-bits", "cold-shards", "rl-bits", "rl-shards", "infer-off", "annotate-pixels",
             "pairs-penalty", "probe", "probe-problem", "check-pixels", "report", "report-decord", "ties"}

# ------------------------------------------------------------------------------------------------------------
# The table


class Row(NamedTuple):
    flag: str  # with the value that it has in the run
    run: str
    says: str
    look: Any


class Pinned(NamedTuple):
    """A flag that another test pins: "file test"."""

    flag: str
    test: str


class Named(NamedTuple):
    """A flag of which it is said why nothing is looked at."""

    flag: str
    why: str


def pinned(flags: str, test: str) -> list[Pinned]:
    return [Pinned(f"--{flag}", test) for flag in flags.split()]


RATED = "test_rated.py test_of_two_videos_of_a_prompt_the_higher_mean_is_preferred"
BY_READER = Pinned("--reader", "test_reader.py test_a_command_reads_by_decord_where_it_is_told_to")


INSISTED = "test_digests.py test_what_is_insisted_on_is_said_and_only_what_decides_is_compared"


def of_both(stage: str) -> list:
    """The flags of support.settings.RunArgs, and those that both stages have of their own."""
    logs, seen, parts, bits = (f"{stage}-{name}" for name in ("logs", "seen", "parts", "bits"))
    return [
        Row("--model {data}/model", seen, "it begins with this model", look.began_with),
        Row("--backbone {data}/model", logs, "the same", look.loaded),
        Row("--train {data}/train.jsonl", stage, "these pairs are trained on", look.all_pairs),
        Row("--test {data}/test_a.jsonl {data}/test_b.jsonl", logs, "figures of both", look.test_sets),
        Row("--label VQ", seen, "right is what this column prefers", look.accuracy_by_the_column),
        Row("--root {world}", seen, "relative paths lead there", look.below_the_root),
        Row("--max-prompt {max_prompt}", seen, "longer prompts are left out, others not", look.left_out),
        Row("--out {out}", stage, "all files are there", look.files_of_a_run),
        Row("--instruction {data}/ask.txt", seen, "each prompt has its words", look.asked),
        Row("--seed 5", logs, "the order of the pairs is that of seed 5", look.order_of_5),
        Row("--fps 1", seen, "4 s have 4 frames, in twos", look.grids((2, 12, 12))),
        Row("--min-pixels 9000", seen, "64 x 64 becomes 96 x 96", look.grids((2, 12, 12))),
        Row("--max-pixels 2500", parts, "64 x 64 becomes 48 x 48", look.grids((4, 6, 6))),
        Row("--gradient-checkpointing false", parts, "no layer is computed again", look.recomputed(False)),
        Row("--no-gradient-checkpointing", logs, "no layer is computed again", look.recomputed(False)),
        Row("--train {data}/train.jsonl", stage, "by default layers are", look.recomputed(True)),
        Row("--quant 4bit", bits, "each linear layer of the language model has 4 bits", look.four_bit),
        Row("--optim adamw8bit", bits, "another optimiser", look.eight_bit),
        Row("--shard full", f"{stage}-shards", "a rank has a part of what trains", look.a_part_on_each_rank),
        Row("--save-every 1", logs, "a checkpoint a step", look.checkpoints),
        Row("--keep 3", logs, "three of four are left", look.checkpoints),
        Row("--workers 1", bits, "a process decodes ahead", look.one_worker),
        Row("--think-tokens 1", seen, "a video at a time", look.rows_together(1)),
        Row("--eval-tokens 100000", logs, "a test set at a time", look.rows_together(2)),
        Row("--eval-before false", seen, "nothing is measured before", look.first_evaluation(1)),
        Row("--no-eval-before", logs, "nothing is measured before", look.first_evaluation(3)),
        Row("--eval-every 3", logs, "after step 3, and at the end", look.evaluated),
        Row("--eval-temperature 0.5", logs, "on test sets it thinks at it", look.eval_temperature),
        Row("--keep-rollouts 1", logs, "one video of each test set", look.held_out),
        Row("--lora-rank 4", logs, "matrices of rank 4", look.rank_4),
        Row("--lora-rank 0", parts, "no adapter", look.no_adapter),
        Row("--train-merger false", bits, "the mergers stay", look.moved("merger", False)),
        *pinned("max-skipped", "test_stages.py test_a_broken_clip_drops_its_pair_up_to_a_limit"),
        *pinned("preset", "test_rewards.py test_a_step_of_a_preset"),
        *pinned("resume", "test_runs.py test_other_settings_stop_with_the_difference"),
        *pinned("resume", "test_digests.py test_a_run_does_not_go_on_with_something_else"),
        *pinned("resume", INSISTED),
        *pinned("keep-best", "test_best.py test_the_best_evaluation_of_a_run_is_kept_as_a_model"),
        *pinned("log", "test_report.py test_tensorboard_gets_what_is_logged_and_nothing_twice"),
        BY_READER,
    ]


def thinking(run: str, videos: int) -> list:
    """The flags that the commands which judge share: an infer.Thinking and what goes with it."""
    return [
        Row("--model {data}/model", run, "this model thinks", look.loaded),
        Row("--instruction {data}/ask.txt", run, "each prompt has its words", look.asked),
        Row("--max-new-tokens 5", run, "no CoT is longer", look.longest_thought(5)),
        Row("--temperature 0.8", run, "it thinks at it", look.told("temperature", 0.8)),
        Row("--seed 4", run, "draws of seed 4, by the numbers of the videos", look.seeds_of_4(videos)),
        Row("--think-tokens 1", run, "a video at a time", look.videos_together(1)),
        BY_READER,
    ]


STEPS1 = "test_steps.py test_stage_1_moves_every_weight_as_adamw_would"
PAIRS1 = "test_steps.py test_one_choice_of_pairs_and_masks_explains_each_step_of_stage_1"
STEPS2 = "test_steps.py test_stage_2_moves_every_weight_as_adamw_would"
FIGURES2 = "test_steps.py test_stage_2_logs_what_the_equations_give"
THOUGHT2 = "test_steps.py test_stage_2_thinks_about_each_video_of_a_step_with_the_weights_before_it"
REACH = "test_hackable.py test_the_flags_of_stage_2_reach_what_they_are_for"
DRAWN = "test_wires.py test_rollouts_are_drawn_at_the_temperature_and_within_top_p"
MEAN = "test_hackable.py test_what_the_loss_is_a_mean_of_is_counted_over_the_whole_update"
EXCESS = "test_wires.py test_the_length_reward_of_a_run_goes_by_its_settings_and_all_tokens"
CHOICE = "test_pairs.py test_pairs_of_a_file_of_prompts_with_their_videos"
QUEUE = "test_serve.py test_beyond_its_queue_it_is_busy_and_it_ends_when_what_it_has_is_done"
PATIENCE = "test_called.py test_an_endpoint_is_waited_for_as_long_and_asked_as_often_as_told"
GENERATIVE = "test_paradigms.py test_a_generative_way_learns_its_cots_and_its_scores_by_a_mean_each"
TIMED = "it says how long something takes, to people; no test depends on it, and a run takes minutes"

TABLE = {
    "coldstart.py": [
        *of_both("cold"),
        Row("--max-new-tokens 4", "cold-logs", "no CoT is longer", look.longest_thought(4)),
        Row("--max-tokens 1", "cold-seen", "a pair at a time", look.scored_together(2)),
        Row("--batch-size 4", "cold", "four pairs, in one forward", look.scored_together(8)),
        Row("--train-vision true", "cold-parts", "its blocks move", look.moved("visual.blocks", True)),
        Row("--no-train-merger", "cold-parts", "the mergers stay", look.moved("merger", False)),
        Row("--log tensorboard", "cold-bits", "a file for TensorBoard", look.tensorboard),
        *pinned("mask-p", "test_steps.py test_p_is_the_chance_that_a_pair_is_masked"),
        *pinned("epochs batch-size", PAIRS1),
        *pinned("lr head-lr warmup weight-decay max-grad-norm", STEPS1),
    ],
    "rl.py": [
        *of_both("rl"),
        Row("--keep-rollouts 1", "rl-logs", "one video of each step", look.kept_rollouts),
        Row("--train-merger true", "rl-parts", "the mergers move", look.moved("merger", True)),
        Row("--log-ratio-bound 0.1", "rl-bounds", "ρ stays below what is clipped", look.unclipped),
        Row("--kl-bound 0.00001", "rl-bounds", "D_KL of a token is at most this", look.bounded_kl),
        *pinned("steps batch-size updates", THOUGHT2),
        *pinned("group-size max-new-tokens w-format w-quality w-length length-low length-high clip-low "
                "clip-high beta bt-weight", FIGURES2),
        *pinned("lr weight-decay max-grad-norm", STEPS2),
        *pinned("max-tokens temperature top-p dual-clip advantage-std no-advantage-std loss-mean "
                "mask-truncated", REACH),
        *pinned("temperature top-p", DRAWN),
        *pinned("dual-clip", "test_equations.py test_grpo_loss_by_other_means_and_clipped_twice"),
        *pinned("loss-mean", MEAN),
        *pinned("length-excess", EXCESS),
        *pinned("rollouts", "test_engine.py test_rollouts_are_those_of_a_function_of_ones_own"),
        *pinned("reward", "test_hackable.py test_a_reward_of_ones_own_is_logged_and_weighs"),
        *pinned("bt-pairs", "test_steps.py test_all_rollouts_of_a_winner_meet_all_of_its_loser"),
    ],
    "infer.py": [
        *thinking("infer", 6),
        Row("--pairs {data}/lists/test.csv", "infer", "the videos of its pairs", look.below_the_root),
        Row("--label VQ", "infer", "right is what this column prefers", look.accuracy_printed),
        Row("--root {world}", "infer", "relative paths lead there", look.below_the_root),
        Row("--out {out}/judged.jsonl", "infer", "a record of each video", look.recorded),
        Row("--cot off", "infer-off", "nothing is thought", look.no_thought),
        Row("--instruction problem", "infer-off", "each prompt is the pair's own", look.problems),
        Row("--scoring-layout release", "infer-penalty", "the records are made in it", look.in_the_releases),
        Row("--workers 1", "infer-off", "a process decodes ahead", look.one_worker),
        Row("--json", "infer", "what is printed is JSON", look.json_of(pairs=3)),
        Row("--report {out}/page.html", "infer-off", "a page is there", look.page),
        Row("--samples 2", "infer", "two CoTs a video", look.told("n", 2)),
        Row("--repetition-penalty 1.3", "infer-penalty", "it is told to the model", look.penalty),
        Row("--max-tokens 100000", "infer-penalty", "all at a time", look.videos_together(2)),
        *pinned("think-at think-at-model api-key-env", "test_think_at.py test_judgements_say_who_thought"),
        *pinned("predictions", "test_predictions.py test_a_file_of_any_shape_has_the_figures_of_its_scores"),
        *pinned("scoring-layout", "test_saved.py test_a_model_scores_in_the_layout_that_it_is_loaded_in"),
        *pinned("repetition-penalty",
                "test_model.py test_the_repetition_penalty_is_that_of_a_plain_greedy_loop"),
    ],
    "-m tools.annotate": [
        *thinking("annotate", 2),
        Row("--max-tokens 100000", "annotate-pixels", "all at a time", look.videos_together(2)),
        Row("--fps 1", "annotate", "4 s have 4 frames, in twos", look.grids((2, 12, 12))),
        Row("--min-pixels 9000", "annotate", "64 x 64 becomes 96 x 96", look.grids((2, 12, 12))),
        Row("--max-pixels 2500", "annotate-pixels", "64 x 64 becomes 48 x 48", look.grids((4, 6, 6))),
        *pinned("api api-model api-key-env parallel scores together seed temperature max-new-tokens",
                "test_called.py test_an_endpoint_is_asked_as_the_flags_say"),
        *pinned("api-clips", "test_think_at.py test_annotate_shows_clips_where_it_is_told_to"),
        *pinned("timeout retries", PATIENCE),
        *pinned("max-skipped", "test_endpoint.py test_refusals_and_failures_have_a_bound"),
    ],
    "-m tools.filter": [
        Row("--model {data}/other", "filter", "CoTs in its words are read", look.kept_by_its_own_words),
    ],
    "-m tools.check": [
        Row("--label VQ", "check", "labels of this column", look.said("labels: 2 A, 1 B")),
        Row("--root {world}", "check", "relative paths lead there", look.said("videos: 6 read, 0 broken")),
        Row("--fps 1", "check", "4 s have 4 frames, in twos", look.said("video tokens a sample: 18 to 18, ")),
        Row("--min-pixels 9000", "check", "64 x 64 becomes 96 x 96", look.said(" model: 6 of 96x96")),
        Row("--max-pixels 2500", "check-pixels", "64 x 64 becomes 32 x 32", look.said(" model: 2 of 32x32")),
        Row("--model {data}/letters", "check", "its tokenizer counts", look.in_letters),
        *pinned("test", "test_protocol.py test_test_pairs_that_were_trained_on_are_said"),
        BY_READER,
    ],
    "-m tools.convert": [
        Row("--label VQ", "convert", "the preferences of this column", look.converted),
        Row("--root {world}", "convert", "relative paths lead there", look.converted),
        *pinned("rated prompt video score", RATED),
        *pinned("per-prompt total seed", "test_rated.py test_pairs_are_bounded_and_drawn_by_the_seed"),
    ],
    "-m tools.pairs": [
        *thinking("pairs", 4),
        Row("--samples 2", "pairs", "two CoTs a video", look.told("n", 2)),
        Row("--repetition-penalty 1.3", "pairs-penalty", "it is told to the model", look.penalty),
        Row("--workers 1", "pairs-penalty", "a process decodes ahead", look.one_worker),
        *pinned("take margin", CHOICE),
        *pinned("scores", "test_pairs.py test_both_stages_train_on_what_is_made"),
    ],
    "-m tools.probe": [
        *thinking("probe", 6),
        Row("--limit 1", "probe-problem", "one of the pairs", look.said("2 videos of 1 pairs")),
        Row("--label VQ", "probe", "right is what this column prefers", look.accuracy_probed),
        Row("--root {world}", "probe", "relative paths lead there", look.json_of(videos=6)),
        Row("--instruction problem", "probe-problem", "each prompt is the pair's own", look.problems),
        Row("--samples 2", "probe", "two CoTs a video, for the spread", look.told("n", 1, 2)),
        Row("--json", "probe", "what is printed is JSON", look.json_of(pairs=3)),
    ],
    "-m tools.report": [
        Row("--out {out}/page.html", "report", "the page is there", look.page),
        Row("--workers 1", "report", "a process decodes", look.one_worker),
        *pinned("png", "test_report.py test_curves_as_pictures"),
        Row("--reader decord", "report-decord", "it is told to whoever opens a file", look.by_decord),
    ],
    "-m tools.serve": [
        *pinned("model device host fps reader cot samples max-new-tokens temperature seed think-tokens "
                "unusable window accept-any round kept allow-host think-at think-at-model api-key-env",
                "test_called.py test_a_server_is_what_its_flags_say"),
        *pinned("port", "test_serve.py test_two_do_not_share_a_port"),
        *pinned("videos", "test_serve.py test_files_are_opened_below_one_folder_alone"),
        *pinned("queue", QUEUE),
        *pinned("max-body", "test_serve.py test_bodies_have_a_bound"),
        *pinned("max-frames max-pixels", "test_serve.py test_files_have_bounds"),
        *pinned("max-videos max-work", "test_server.py test_a_request_has_bounds_that_are_said"),
    ],
    "toy/world.py": [
        *pinned("pairs test-pairs", "test_called.py test_the_world_is_as_large_as_was_asked_for"),
        *pinned("seed", "test_world.py test_the_same_seed_makes_the_same_data_and_another_seed_another"),
    ],
    "toy/prepare.py": pinned("pairs test-pairs seed",
                             "test_called.py test_the_embedded_data_is_made_as_it_was_asked_for"),
    "toy/pretrain.py": pinned("out seed lessons batch-size lr vocab-size",
                              "test_called.py test_a_backbone_is_trained_as_it_was_asked_for"),
    "experiments/ceilings.py": pinned("pairs seed",
                                      "test_called.py test_ceilings_are_of_the_pairs_asked_for"),
    "experiments/claims.py": pinned("only seeds quick tables",
                                    "test_called.py test_claims_are_measured_as_they_were_asked_for"),
    "experiments/post_train.py": [
        *pinned("model out seeds steps", "test_post_train.py test_what_is_there_is_shown_and_not_repeated"),
        *pinned("picture", "test_called.py test_curves_of_post_training_go_where_they_were_asked_to"),
    ],
    "experiments/swapped.py": pinned("pairs", "test_called.py test_as_many_videos_are_swapped_as_asked_for"),
    "experiments/paradigms.py expected": [],
    "experiments/paradigms.py ties": [Row("--theta 2", "ties", "the loss has this θ", look.by_theta)],
    "experiments/paradigms.py supervise": pinned("think no-think", GENERATIVE),
    "experiments/paradigms.py pairwise": [],
    "bench/memory.py": pinned("prompt cot group-size",
                              "test_called.py test_memory_is_computed_for_what_was_asked_for"),
    "bench/real_size.py": [
        *pinned("only out", "test_real_size.py test_what_is_too_large_is_not_started"),
        *pinned("clips", "test_real_size.py test_the_clips_are_those_of_a_folder"),
    ],
    "bench/frames.py": [*pinned("check", "test_docs.py test_a_command_runs"), Named("--repeats", TIMED)],
    "bench/padding.py": [],
    **{f"bench/{name}.py": [Named(f"--{flag}", TIMED) for flag in flags.split()] for name, flags in {
        "gpu": "size device video-tokens cot-tokens group-size repeats peak",
        "speed": "size device video-tokens cot-tokens group-size repeats only",
        "scaling": "size device ways groups prompts cots group-size video-tokens cot-tokens checkpointing "
                   "repeats out one",
        "step_profile": "model train pairs group-size max-new-tokens lora-rank repeats size video-tokens",
        "peer": "python repeats run asked",
        "idle": "ranks", "servers": "model callers repeats",
    }.items()},
}
# The paradigms are loops of the stages, and have their flags, which they hand on to the same functions.
# tests/test_paradigms.py trains them; of their own flags alone there are rows above.
LOOPS_OF = {"expected": "coldstart.py", "ties": "coldstart.py", "supervise": "coldstart.py",
            "pairwise": "rl.py"}
for way, stage in LOOPS_OF.items():
    TABLE[f"experiments/paradigms.py {way}"] += [Named(row.flag, f"as in {stage}") for row in TABLE[stage]]
