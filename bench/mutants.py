"""Faults planted in a copy of the project, one at a time: do the tests that should see one fail?

    python bench/mutants.py                 # all of them, two at a time; prints what survived
    python bench/mutants.py --only clip     # those whose file, old or new text holds a word

A mutant is (file, old text, new text, tests). The old text must stand in the file exactly once: a
mutant that has lost its place is an error, so that the list is kept up with the code.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
EQUATIONS, MODEL = "tests/test_equations.py", "tests/test_model.py"
DATA, FORMATS, PARITY = "tests/test_data.py", "tests/test_formats.py", "tests/test_parity.py"
STAGES, RUNS, WIRES = "tests/test_stages.py", "tests/test_runs.py", "tests/test_wires.py"
HACKABLE, SAVED, JUDGING = "tests/test_hackable.py", "tests/test_saved.py", "tests/test_judging.py"
FUZZ, FRAMES = "tests/test_fuzz.py", "tests/test_frames.py"
WORLD, PARADIGMS = "tests/test_world.py", "tests/test_paradigms.py"
REPORT, BROWSER = "tests/test_report.py", "tests/test_browser.py"
MEMORY, SERVE, ADAPTERS = "tests/test_memory.py", "tests/test_serve.py", "tests/test_adapters.py"
STEPS1, STEPS2 = "tests/test_steps.py -k stage_1", "tests/test_steps.py -k stage_2"
MASKED = "tests/test_steps.py -k masked"
PAIRS, PROBE = "tests/test_pairs.py", "tests/test_probe.py"
NUMBERS, BOUNDS = f"{HACKABLE} -k every_number", f"{HACKABLE} -k bounds"

MUTANTS = [
    # -- stage 1: the pair loss, masking, order, optimiser
    ("coldstart.py", "-F.logsigmoid(r_w - r_l)", "-F.logsigmoid(r_l - r_w)", EQUATIONS),
    ("coldstart.py", "-F.logsigmoid(r_w - r_l)", "F.logsigmoid(r_w - r_l)", EQUATIONS),
    ("coldstart.py", "(r_w - r_l) * weight", "(r_w - r_l)", EQUATIONS),
    ("coldstart.py", "losses.numel() if count is None else count", "losses.numel()", EQUATIONS),
    ("coldstart.py", "generator=generator) < p)", "generator=generator) < 0.5)", MASKED),
    ("coldstart.py", "generator=generator) < p)", "generator=generator) > p)", MASKED),
    ("coldstart.py", "draw_seed(seed, step)", "draw_seed(seed, 0)", EQUATIONS),
    ("coldstart.py", "draw_seed(seed, epoch)", "draw_seed(seed, 0)", EQUATIONS),
    ("coldstart.py", "for epoch in range(epochs)", "for epoch in range(1)", EQUATIONS),
    ("coldstart.py", "cot_a=None, cot_b=None)", "cot_a=None)", STEPS1),
    ("coldstart.py", "cot_a=None, cot_b=None)", "cot_b=None)", STEPS1),
    ("coldstart.py", "if masked[place]:", "if False:", STEPS1),
    ("coldstart.py", 'both(micro.pairs, "cot")',
     'both([replace(p, cot_a=p.cot_b, cot_b=p.cot_a) for p in micro.pairs], "cot")', STEPS1),
    ("coldstart.py", "r_w, r_l = scores.view(-1, 2).unbind(1)",
     "r_l, r_w = scores.view(-1, 2).unbind(1)", STEPS1),
    ("coldstart.py", "rate * min(1.0, step / warmup)", "rate", STEPS1),
    ("coldstart.py", "max(1, round(args.warmup * len(plan)))", "len(plan)", STEPS1),
    ("coldstart.py", "args.head_lr or args.lr", "args.lr", STEPS1),
    ("coldstart.py", "support.annotate)\", ties=False)", "support.annotate)\")", STEPS1),
    ("coldstart.py", "run.prepare(model, groups, args.weight_decay)",
     "run.prepare(model, groups, 0.0)", STEPS1),
    ("coldstart.py", "run.descend(args.max_grad_norm)", "run.descend(1e9)", STEPS1),
    ("coldstart.py", "args.lora_rank, args.train_merger, args.train_vision", "args.lora_rank", STEPS1),
    ("coldstart.py", "sum(micro.weight.sum() for micro in micro_batches)", "len(micro_batches)", STEPS1),
    ("coldstart.py", "accuracy=(r_w > r_l)", "accuracy=(r_w < r_l)", STEPS1),
    ("coldstart.py", "margin=r_w - r_l", "margin=r_l - r_w", STEPS1),
    # -- stage 2: rewards
    ("rl.py", "float(follows_format(text, dimensions))", "1.0", EQUATIONS),
    ("rl.py", "(n_tokens - low) / (high - low)", "n_tokens / high", EQUATIONS),
    ("rl.py", "(n_tokens - excess) / (high - low)", "0.0", EQUATIONS),
    ("rl.py", "min(said, n_tokens), *bounds)", "min(said, n_tokens), *bounds[:2])", WIRES),
    ("rl.py", "min(said, n_tokens), *bounds)", "min(said, n_tokens))", STEPS2),
    ("rl.py", "min(said, n_tokens)", "said", HACKABLE + " -k never_longer"),
    ("rl.py", "if name in given_names:", "if False:", HACKABLE + " -k one_name"),
    ("rl.py", "abs(value) < 1e30", "value == value", HACKABLE + " -k overflows"),
    ("rl.py", "encode(thought(text, dimensions))", "encode(text)", STEPS2),
    ("rl.py", "not low < high <= (high if excess is None else excess)", "False", EQUATIONS),
    ("rl.py", "length_reward(0, self.length_low,", "(lambda *x: x)(0, self.length_low,", BOUNDS),
    ("rl.py", '"format": (args.w_format,', '"format": (args.w_quality,', STEPS2),
    ("rl.py", '"length": (args.w_length,', '"length": (args.w_format,', STEPS2),
    ("rl.py", "total += weight * part", "total += part", STEPS2),
    ("rl.py", "gold[i // lengths.shape[1]]", "gold[i % len(gold)]", STEPS2),
    ("rl.py", "lengths, truncated = mask.sum(-1), ", "lengths, truncated = mask.sum(-1) - 1, ", STEPS2),
    ("rl.py", "for given in args.reward:", "for given in args.reward[1:]:", HACKABLE),
    # -- stage 2: advantages and GRPO
    ("rl.py", "rewards - rewards.mean(1, keepdim=True)", "rewards", EQUATIONS),
    ("rl.py", "rewards - rewards.mean(1, keepdim=True)", "rewards - rewards.mean()", EQUATIONS),
    ("rl.py", "std = rewards.std(1, keepdim=True)", "std = rewards.std(1, correction=0, keepdim=True)",
     EQUATIONS),
    ("rl.py", "if divide_by_std and", "if", EQUATIONS),
    ("rl.py", "model.device), args.advantage_std)", "model.device))", HACKABLE),
    ("rl.py", "log_ratio = (logps - old_logps)", "log_ratio = (old_logps - logps)", EQUATIONS),
    ("rl.py", "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)", EQUATIONS),
    ("rl.py", "torch.minimum(ratio * A, clipped * A)", "torch.maximum(ratio * A, clipped * A)", EQUATIONS),
    ("rl.py", "torch.minimum(ratio * A, clipped * A)", "ratio * A", EQUATIONS),
    ("rl.py", "torch.where(A < 0, torch.maximum", "torch.where(A > 0, torch.maximum", EQUATIONS),
    ("rl.py", "dual_clip * A), objective)", "dual_clip), objective)", EQUATIONS),
    ("rl.py", "to_ref = (ref_logps - logps)", "to_ref = (logps - ref_logps)", EQUATIONS),
    ("rl.py", "to_ref.exp() - to_ref - 1 ", "to_ref.exp() - 1 ", EQUATIONS),
    ("rl.py", "objective - beta * kl", "objective + beta * kl", EQUATIONS),
    ("rl.py", "terms / lengths.clamp(min=1)", "terms / lengths.float().mean()", EQUATIONS),
    ("rl.py", 'if loss_mean == "cot":', "if True:", EQUATIONS),
    ("rl.py", '"token": lengths.sum(), ', '"token": lengths.numel(), ', EQUATIONS),
    ("rl.py", "return -terms.sum() / count", "return terms.sum() / count", EQUATIONS),
    ("rl.py", "(objective - beta * kl) * mask", "(objective - beta * kl)", EQUATIONS),
    ("rl.py", "(clipped * A < ratio * A) & mask", "(clipped * A > ratio * A) & mask", STEPS2),
    # -- stage 2: what feeds the losses
    ("rl.py", "L = L_GRPO + λ * L_BT", "L = L_GRPO + 10 * λ * L_BT", STEPS2),
    ("rl.py", "L = L_GRPO + λ * L_BT", "L = L_GRPO - λ * L_BT", STEPS2),
    ("rl.py", "L = L_GRPO + λ * L_BT", "L = λ * L_BT", STEPS2),
    ("rl.py", "r_w, r_l = scores.view(-1, 2, G).unbind(1)", "r_l, r_w = scores.view(-1, 2, G).unbind(1)",
     STEPS2),
    ("rl.py", 'pair.preference != "tie"', "True", STEPS2),
    ("rl.py", "o.decided.sum() * args.group_size", "o.decided.sum()", STEPS2),
    ("rl.py", "cots += o.learnt.any(-1).sum()", "cots += len(o.learnt)", STEPS2),
    ("rl.py", '"token": tokens,', '"token": cots,', HACKABLE),
    ("rl.py", "cots * args.max_new_tokens}", "cots}", HACKABLE),
    ("rl.py", "ref_logps = model.reference_logps(encoded, tokens, mask, args.temperature)",
     "ref_logps = old_logps", STEPS2),
    ("rl.py", "encoded, tokens, mask, args.temperature)", "encoded, tokens, mask)", WIRES),
    ("rl.py", "o.tokens, o.mask, args.temperature)", "o.tokens, o.mask)", WIRES),
    ("rl.py", "args.temperature, args.top_p, seeds)", "1.0, args.top_p, seeds)", WIRES),
    ("rl.py", "args.temperature, args.top_p, seeds)", "args.temperature, 1.0, seeds)", WIRES),
    ("rl.py", "draw_seed(args.seed, step, place, side)", "draw_seed(args.seed, place, side)", WIRES),
    ("rl.py", "if args.mask_truncated:", "if False:", HACKABLE),
    ("rl.py", "for rollouts in rolled:", "for rollouts in rolled[:1]:", STEPS2),
    ("rl.py", "clip_low=args.clip_low, clip_high=args.clip_high",
     "clip_low=args.clip_high, clip_high=args.clip_low", STEPS2),
    ("rl.py", "beta=args.beta,", "", STEPS2),
    ("rl.py", "loss_mean=args.loss_mean, ", "", HACKABLE),
    ("rl.py", "dual_clip=args.dual_clip)", ")", HACKABLE),
    ("rl.py", "args.bt_weight\n", "0.005\n", STEPS2),
    ("rl.py", '"lr": args.lr}]', '"lr": 1e-5}]', STEPS2),
    ("rl.py", "bt_accuracy=(r_w > r_l)", "bt_accuracy=(r_w < r_l)", STEPS2),
    ("rl.py", "-old_logps.sum(-1) / lengths", "-old_logps.sum(-1)", STEPS2),
    ("rl.py", "parts(units, args.updates)", "[units]", STEPS2),
    # -- the model
    ("model.py", "alpha = 2 * lora_rank", "alpha = lora_rank", STEPS1),
    ("model.py", 'OWN = ("query", "head.")', 'OWN = ("head.",)', STEPS1),
    ("model.py", "/ 127.5 - 1)", "/ 255)", MODEL),
    ("model.py", "is_video = in_prompt & (ids", "is_video = (ids", MODEL),
    ("model.py", "deepstack_visual_embeds=deepstack,", "", MODEL),
    ("model.py", "self.logits(hidden) / (temperature or 1.0)", "self.logits(hidden)", MODEL),
    ("model.py", "logits = self.logits(h) / (temperature or 1.0)", "logits = self.logits(h)", MODEL),
    ("model.py", "ordered.cumsum(-1) - ordered >= top_p", "ordered.cumsum(-1) >= top_p", EQUATIONS),
    ("model.py", "cache.keep(videos, columns)", "pass", MODEL),
    ("model.py", 'set_adapter("reference", inference_mode=True)', 'set_adapter("default")', MODEL),
    ("model.py", "cache.step = 0  #", "#", MODEL),
    ("model.py", "r if self.has_head else torch.full_like(r, torch.nan)", "r", SAVED),
    ("model.py", "if not self.has_head:", "if False:", SAVED),
    ("model.py", "~(is_end & thoughts.mask).any(-1)", "(is_end & thoughts.mask).any(-1)", MODEL),
    ("model.py", "position[rows] + C)", "position[rows] + C + 1)", MODEL),
    ("model.py", "(batch.position_ids.amax((0, 2)) + 1)", "(batch.position_ids.amax((0, 2)))", MODEL),
    ("support/attention.py", "positions = (start + slot)", "positions = (start + slot + 1)", MODEL),
    ("support/attention.py", "dtype=torch.bool, device=device).tril()", "dtype=torch.bool, device=device)",
     MODEL),
    ("support/attention.py", "on_prompt.float() + bias", "on_prompt.float()", MODEL),
    ("support/attention.py", "(slot == length).flatten(1)", "(slot == length - 1).flatten(1)", MODEL),
    # -- data
    ("data.py", 'if self.preference != "B":', "if True:", STEPS1),
    ("data.py", 'if self.preference != "B":', "if True:", STEPS2),
    ("data.py", '("video", "cot", "scores", "model")', '("video", "scores", "model")', STEPS1),
    ("data.py", '("video", "cot", "scores", "model")', '("video", "cot", "model")', STEPS2),
    ("data.py", "(seconds[first] + seconds[first + frames - 1]) / 2", "seconds[first]", PARITY),
    ("data.py", "x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)", "x.permute(0, 3, 6, 7, 4, 2, 1, 5, 8)", DATA),
    ("data.py", 'mode="bicubic", antialias=True', 'mode="bicubic"', PARITY),
    ("data.py", "value in (0, 1, 2)", "value in (0, 1, 2, 3)", EQUATIONS),
    ("data.py", "if size > TEXT_LIMIT:", "if False:", DATA),
    ("data.py", 'checked(value, f"{where}: {key}")', "pass", DATA),
    ("data.py", 'checked(prompt, "the prompt")', "pass", DATA),
    ("model.py", 'checked(cot or "", "a CoT")', 'cot or ""', DATA),
    # -- what a thought is
    ("support/thought.py", "len(TAG.findall(text)) == 4", "len(TAG.findall(text)) >= 4", EQUATIONS),
    ("support/thought.py", "cot is None or len(cot) > 2", "cot is None", EQUATIONS),
    ("support/thought.py", "- implied) > 1:", "- implied) > 4:", EQUATIONS),
    ("support/thought.py", "len(words) >= 3 and words - answer", "len(words) >= 3", EQUATIONS),
    ("support/thought.py", "len(words) >= 3 and words - answer", "words - answer", EQUATIONS),
    ("support/thought.py", "said = substance(match[1])", "said = match[1]", FUZZ),
    ("support/thought.py", 'MARKUP.sub("", ', '("" + ', FUZZ),
    ("support/thought.py", 'BLANK.sub("", ', '("" + ', FUZZ),
    ("support/thought.py", "filter(is_seen, text)", "text", FUZZ),
    ("support/thought.py", '" ".join(line.split())', "line", FUZZ),
    ("support/thought.py", 'NUMBER.sub("0", ', '("" + ', FUZZ),
    ("support/thought.py", 'SIGNS.sub(first_sign, ', '("" + ', FUZZ),
    ("support/thought.py", "199}?)\\1{2,}", "199}?)\\1{2000,}", FUZZ),
    ("support/thought.py", "said.add(letters)", "pass", FUZZ),
    # -- the range of a number
    ("support/command.py", "abs(value) < 2**63 and fits(value)", "fits(value)", NUMBERS),
    ("support/command.py", "abs(value) < 2**63 and fits(value)", "True", NUMBERS),
    ("support/settings.py", '- {"preset"}', "", f"{HACKABLE} -k bad_value"),
    ("support/settings.py", "if not callable(function):", "if False:", f"{HACKABLE} -k reward_that"),
    ("data.py", "sum(matched) / len(matched)", "sum(matched) / len(scores)", EQUATIONS),
    ("data.py", "dimensions[name] * scores[name]", "scores[name]", EQUATIONS),
    ("data.py", "split_special_tokens=True", "split_special_tokens=False", DATA),
    ("data.py", "video.seconds[index] for", "index / video.fps for", FRAMES),
    ("support/frames.py", "for packet in packets if not packet.is_discard", "for packet in packets", FRAMES),
    ("support/frames.py", " or stamps[0] > min(stamps)", "", FRAMES),
    ("support/frames.py", "samples >= len(stream.index_entries)", "True", FRAMES),
    ("support/frames.py", "<= end + 1.5 /", "<= end + 1e9 /", FRAMES),
    ("support/frames.py", "size + 8 <= path.stat()", "True or path.stat()", FRAMES),
    ("support/frames.py", "size == 2**32 - 1 or ", "", FRAMES + " -k pipe"),
    ("support/frames.py", '"format_whitelist": CONTAINERS, ', "", FRAMES),
    ("support/frames.py", " or stream.disposition & av.stream.Disposition.attached_pic", "", FRAMES),
    ("support/frames.py", "round(frame.rotation / 90)", "0", FRAMES),
    ("support/frames.py", "if count != self.total:", "if False:", FRAMES),
    ("support/frames.py", "in sorted(stamps)]", "in stamps]", FRAMES),
    ("support/frames.py", "min(max(tick, 0.001), 0.25 / rate)", "max(tick, 0.001)", FRAMES),
    ("support/frames.py", "(stamp - min(stamps)) * tick", "stamp * tick", FRAMES),
    ("support/frames.py", 'limit | {"err_detect": "explode"}', "limit", FRAMES),
    # -- inference
    ("infer.py", "right[human != 0]", "right", EQUATIONS),
    ("infer.py", "allowed[1:-1] = size[1:] != size[:-1]", "pass", EQUATIONS),
    ("infer.py", "found.append(a - b)", "found.append(b - a)", STAGES),
    ("infer.py", "tables.check_finite(model, records)", "pass", JUDGING + " -k finite"),
    ("infer.py", "    if finite:\n        model.check_head()", "pass", STAGES + " -k one_clear_line"),
    ("infer.py", "for key, record in by_key(records).items() if key not in done]",
     "for key, record in by_key(records).items()]", STAGES + " -k resumed"),
    ("infer.py", "model.encode(batch).select(rows)", "model.encode(batch)", JUDGING + " -k evaluation"),
    ("infer.py", "ranks.share(list(zip(numbers or range(len(keys)), keys)))",
     "list(enumerate(ranks.share(keys)))",
     JUDGING + " -k ranks"),
    ("infer.py", "{*judged}, args.samples", "(), args.samples", STAGES + " -k resumed"),
    ("support/journal.py", '"weights": fingerprint(model), ', "", JUDGING + " -k retrained"),
    ("support/journal.py", "{**before, **now}", "now", JUDGING + " -k journal"),
    ("support/journal.py", 'content.split(b"\\n")', "content.splitlines()", JUDGING + " -k journal"),
    ("support/journal.py", "os.truncate(path, len(content) - len(half))", "pass", JUDGING + " -k journal"),
    ("support/journal.py", 'if "error" in record:', "if False:", JUDGING + " -k alone"),
    ("support/journal.py", "kind is not float or math.isfinite(value)", "True", JUDGING + " -k number"),
    ("support/ranks.py", "self.gather(next(lists, []))", "next(lists, [])", JUDGING + " -k ranks"),
    ("support/tables.py", "not bad.intersection(pair.videos())", "True", JUDGING + " -k evaluation"),
    ("support/tables.py", "json.dumps(plain(found)", "json.dumps(found", JUDGING + " -k base"),
    ("support/annotate.py", "if not code:", "if True:", JUDGING + " -k alone"),
    ("support/annotate.py", 'load(args.model, video=video)', 'load(args.model)', JUDGING + " -k looks"),
    ("support/formats.py", "beside.unlink(missing_ok=True)", "pass", JUDGING + " -k whole"),
    ("support/annotate.py", "if not kept:", "if False:", WIRES),
    ("infer.py", "draw_seed(seed, number)", "draw_seed(seed)", MODEL),
    # -- support
    ("support/run.py", "min(1.0, max_norm / (norm + 1e-6))", "1.0", STEPS1),
    ("support/run.py", "self.optimizer.zero_grad(set_to_none=True)", "pass", STEPS1),
    ("support/run.py", "weight = torch.tensor(weights) * torch.tensor([not error for error in errors])",
     "weight = torch.tensor(weights)", WIRES),
    ("support/run.py", "dist.all_reduce(flat)", "pass", RUNS + " -k train_like_one"),
    ("support/run.py", "grad.mul_(self.ranks.world)", "pass", RUNS + " -k sharded"),
    ("support/run.py", "if is_finite and norm > 0:", "if norm != 0:", WIRES),
    ("support/run.py", "groups, self.args.workers, self.args.max_prompt)", "groups, self.args.workers)",
     WIRES),
    ("support/batches.py", "0.0 if spare else 1.0", "1.0", RUNS + " -k train_like_one"),
    ("support/batches.py", "if limit and length > limit:", "if limit and length >= limit:", DATA),
    ("support/checkpoint.py", "local(parameter).data.copy_(weights[name])", "pass", RUNS + " -k killed"),
    ("support/checkpoint.py", 'check(path / "state.json")', "pass", RUNS + " -k bytes"),
    ("support/checkpoint.py", 'check(path / f"rank-{rank}.safetensors")', "pass", RUNS + " -k bytes"),
    ("support/checkpoint.py", "errors = self.ranks.gather(errors)", "pass", RUNS + " -k agree"),
    ("support/checkpoint.py", "if step_of(path) <= step]", "]", RUNS + " -k push_out"),
    ("support/files.py", "place.rename(replaced)", "delete(place)", RUNS + " -k whenever"),
    ("support/files.py", "if replaced.exists() and not place.exists():", "if False:", RUNS + " -k whenever"),
    ("support/run.py", 'file.truncate(content.rfind(b"\\n") + 1)', "file.truncate(size)", RUNS + " -k grows"),
    ("support/run.py", "sync(path)  #", "pass  #", RUNS + " -k counts_on_them"),
    ("support/run.py", "(value, 1.0) if weight else (0.0, 0.0)", "(value, 1.0)", RUNS + " -k total"),
    ("support/run.py", '("scoring_layout", "score_mean", "score_std", "score_quantiles")',
     '("scoring_layout",)', STAGES + " -k mergers"),
    ("support/batches.py", "count = min(count, len(items))", "count = len(items)", RUNS + " -k cut_into"),
    ("support/filter.py", "implied = (a > b) - (a < b)", "implied = (a < b) - (a > b)", FORMATS),
    ("support/formats.py", '"same": "tie"', '"same": "A"', FORMATS),
    ("support/release.py", "1000: 0.2", "1000: 0.3", HACKABLE),
    ("support/saved.py", "model.changed = set(weights)", "pass", MODEL),
    ("support/saved.py", 'lacking=found["missing_keys"]', "lacking=()", SAVED),
    ("support/saved.py", 'unused=found["unexpected_keys"]', "unused=()", SAVED),
    ("support/saved.py", "lacking=wanted - found, unused=found - wanted", "lacking=(), unused=()", SAVED),
    ("support/saved.py", "lacking=set(own_weights(model)) - set(weights)", "lacking=()", SAVED),
    ("support/saved.py", "check_finite(path, weights)", "pass", SAVED),
    ("support/saved.py", "check_finite(path, adapter_weights(model))", "pass", SAVED),
    ("support/saved.py", "check_finite(directory, dict(qwen.named_parameters()))", "pass", SAVED),
    ("support/saved.py", "own_weights(model) if model.has_head else {}", "own_weights(model)", SAVED),
    ("support/release.py", "replace(model.processor.settings, **size or {})", "model.processor.settings",
     SAVED),
    ("support/release.py", "if not head.isfinite().all():", "if False:", SAVED),
    ("support/formats.py", 'if record.get("problem"):', "if False:", FORMATS),
    ("support/formats.py", 'return record | {"prompt": record.get(column)}',
     'return record | {"prompt": record["prompt"]}', FORMATS),
    ("support/saved.py", '"dimensions": processor.dimensions', '"seen": True', HACKABLE),
    ("support/saved.py", "if digest(directory / name) != wanted:", "if False:", SAVED + " -k as_it_was"),
    ("support/files.py", "or out.samefile(pairs)", "", JUDGING + " -k over_itself"),
    ("support/files.py", "if scale and scale[1] < 0:", "if False:", SAVED + " -k no_sense"),
    ("support/formats.py", "os.path.realpath(folder)", "folder", JUDGING + " -k linked"),
    ("support/formats.py", "len(set(columns)) < len(columns)", "False", JUDGING + " -k twice"),
    ("support/journal.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH", JUDGING + " -k one_file"),
    ("support/journal.py", "(part.long() * odd)", "part.long()", JUDGING + " -k told_apart"),
    ("support/journal.py", '"lora_alpha", ', "", JUDGING + " -k told_apart"),
    ("support/run.py", 'if not state and (self.out / "model").is_dir():', "if False:",
     RUNS + " -k passed_over"),
    ("support/checkpoint.py", "if paths:", "if False:", RUNS + " -k begun_anew"),
    ("data.py", 'or "<prompt>" not in instruction', "", SAVED + " -k no_sense"),
    ("data.py", "record = json.loads(line, object_pairs_hook=no_duplicates)", "record = json.loads(line)",
     JUDGING + " -k twice"),
    ("support/release.py", "model.score(again, [None] * len(keys))", "model.score(again, cots)", SAVED),
    ("support/release.py", "if size:", "if False:", SAVED),
    ("support/annotate.py", "> TEXT_LIMIT", "> 2 * TEXT_LIMIT", JUDGING + " -k may_hold"),
    ("support/command.py", "SystemExit(130)", "SystemExit(0)", JUDGING + " -k interrupted"),
    ("support/thought.py", "html.unescape(text)", "text", FUZZ + " -k is_left"),
    ("support/thought.py", "return run[0][:3] if marks else run[1]", "return run[1]", FUZZ + " -k is_left"),
    ("data.py", "return re.sub(r\"[\\r", "return re.sub(r\"[\\t", DATA + " -k one_line"),
    # -- the embedded world, and what its figures say
    ("infer.py", "read = 0 if None in (a, b) else (a > b) - (a < b)",
     "read = 1 if None in (a, b) else (a > b) - (a < b)", JUDGING + " -k reading"),
    ("infer.py", "(1 + read * pair.human) / 2", "float(read == pair.human)", JUDGING + " -k reading"),
    ("data.py", 'return cot and cot["overall_score"]\n', "return cot and 3.0\n", JUDGING + " -k reading"),
    ("toy/world.py", "if novel or not is_novel(scene):", "if True:", WORLD + " -k novel_combinations"),
    ("toy/world.py", 'novel, generators = split == "test_ood",', "novel, generators = False,",
     WORLD + " -k novel_combinations"),
    ("toy/world.py", "0.0 if novel else WORN", "WORN", WORLD + " -k looks_go"),
    ("toy/world.py", '"garnet": Generator(2.2, "grain")', '"garnet": Generator(2.2, "vignette")',
     WORLD + " -k looks_go"),
    ("toy/world.py", "short < PARTLY else 1 if short < MISSED", "short < MISSED else 1 if short < MISSED",
     WORLD + " -k sub_scores"),
    ("toy/world.py", "return (1 - STEADINESS) * met + STEADINESS * (1 - clip.flicker)", "return met",
     WORLD + " -k quality"),
    ("toy/world.py", "margin += rng.normal(0, ANNOTATOR_NOISE)", "", WORLD + " -k looks_go"),
    ("toy/world.py", "frames = frames * (1 - 0.5 * clip.flicker * dark)", "", WORLD + " -k degree"),
    ("toy/pretrain.py", "novel=False)\n    clip = draw_clip(asked, rng)\n    frames",
     "novel=True)\n    clip = draw_clip(asked, rng)\n    frames", WORLD + " -k pretraining"),
    # -- the other paradigms
    ("bench/paradigms.py", "win, lose = F.softplus(log_theta - d), F.softplus(log_theta + d)",
     "win, lose = F.softplus(-d), F.softplus(d)", PARADIGMS + " -k ties"),
    ("bench/paradigms.py", "return torch.where(is_tie, win + lose - torch.tensor(theta**2 - 1).log(), win)",
     "return win", PARADIGMS + " -k ties"),
    ("bench/paradigms.py", "beats_l = torch.where(w_reads, beats, 1.0) * l_reads",
     "beats_l = torch.where(w_reads, 1 - beats, 1.0) * l_reads", PARADIGMS + " -k rewards"),
    ("bench/paradigms.py", "+ 0.5 * (w == l)", "+ 0.0 * (w == l)", PARADIGMS + " -k rewards"),
    ("bench/paradigms.py", "r_w[:, :, None] - r_l[:, None, :]", "r_w[:, :, None] - r_l[:, :, None]",
     PARADIGMS + " -k all_pairs"),
    ("bench/paradigms.py", "return values[odds.argmax(1)], odds @ values",
     "return values[odds.argmax(1)], values[odds.argmax(1)]", PARADIGMS + " -k expectation"),
    ("bench/paradigms.py", "lengths = torch.tensor([[len(i), 0] for i in ids])",
     "lengths = torch.tensor([[len(i), len(i)] for i in ids])", PARADIGMS + " -k both"),
    ("bench/claims.py", "rng.choice(list(scores), count, replace=False)",
     "rng.choice(list(scores), count, replace=True)", PARADIGMS + " -k falsified"),
    ("bench/results.py", "for seed in rng.choice(seeds, len(seeds))", "for seed in seeds[:1]",
     PARADIGMS + " -k interval"),
    # -- pages, trackers, the ratio before the first update
    ("rl.py", "run.check_ratio(logps, o.old_logps, o.learnt)", "pass", REPORT + " -k first_update"),
    ("support/run.py", "if self.means.update == 0 and learnt.any():", "if learnt.any():",
     REPORT + " -k ratio"),
    ("support/run.py", "(logps.detach() - old_logps)[learnt]", "(logps.detach() - old_logps)",
     REPORT + " -k ratio"),
    ("support/run.py", "log_ratio.abs().max()", "log_ratio.max()", REPORT + " -k ratio"),
    ("support/run.py", "not (self.warned or gap <= bound)", "not (self.warned or gap > bound)",
     REPORT + " -k ratio"),
    ("support/run.py", "not (self.warned or gap <= bound)", "not gap <= bound", REPORT + " -k ratio"),
    ("support/run.py", "return a if math.isnan(a) or a > b else b", "return b", REPORT + " -k largest"),
    ("support/run.py", "ranks.gather([self.most])", "[self.most]", REPORT + " -k largest"),
    ("support/run.py", "list(references)[: self.args.keep_rollouts]", "list(references)",
     REPORT + " -k held_out"),
    ("support/run.py", "self.tracker.send(record)", "pass", REPORT + " -k tensorboard_gets"),
    ("support/trackers.py", 'delete(self.folder / "tensorboard")', "pass", REPORT + " -k nothing_twice"),
    ("support/trackers.py", "if step > self.state[kind]:", "if True:", REPORT + " -k wandb"),
    ("support/trackers.py", '"evaluation" if any("/" in name for name in figures) else "step"', '"step"',
     REPORT + " -k wandb"),
    ("support/trackers.py", "self.works = False", "pass", REPORT + " -k wandb"),
    ("support/report.py", '.replace("<", "\\\\u003c")', "", REPORT + " -k stays_text"),
    ("support/report.py", "html.escape(title)", "title", REPORT + " -k stays_text"),
    ("support/report.py", "return loss(human * margin) if human", "return loss(margin) if human", REPORT),
    ("support/report.py", "margin * human > 0", "margin * human >= 0", REPORT + " -k zero"),
    ("support/report.py", "bisect.bisect_left(scale, score)", "bisect.bisect_left(scale, -score)", REPORT),
    ("support/report.py", "round(seconds[index], 2) for index in chosen", "round(s, 2) for s in seconds",
     REPORT + " -k strip"),
    ("support/files.py", "*lines, _ = content.split", "lines = content.split", REPORT + " -k curves"),
    ("support/page.html", "(b.wrong ?? -1) - (a.wrong ?? -1)", "(a.wrong ?? -1) - (b.wrong ?? -1)", BROWSER),
    ("support/page.html", "pair.verdict === state.verdict)", "true)", BROWSER),
    ("support/page.html", "line-height: 1.4; overflow-wrap: anywhere; }", "white-space: nowrap; }", BROWSER),
    ("support/page.html", "if (found.error) return el(", "if (false) return el(", BROWSER),
    # -- pairs from scores, and what a score goes by
    ("support/pairs.py", "ranked[:1] + ranked[1:][-1:]", "ranked[:2]", PAIRS + " -k equal"),
    ("support/pairs.py", "-video[0][\"score\"]", "video[0][\"score\"]", PAIRS + " -k equal"),
    ("support/pairs.py", "not pair.margin > margin", "pair.margin < margin", PAIRS + " -k equal"),
    ("support/pairs.py", "/ (std or 1.0)", "", PAIRS + " -k equal"),
    ("support/pairs.py", "if \"error\" not in judged[key]:", "if True:", PAIRS + " -k equal"),
    ("support/pairs.py", "> TEXT_LIMIT:", "> 2 * TEXT_LIMIT:", PAIRS + " -k equal"),
    ("support/pairs.py", "math.hypot(a[\"score_std\"], b[\"score_std\"])",
     "a[\"score_std\"] + b[\"score_std\"]", PAIRS + " -k how_sure"),
    ("support/pairs.py", "spread * math.sqrt(samples)", "spread", PAIRS + " -k how_sure"),
    ("support/pairs.py", "if times > 1:", "if False:", PAIRS + " -k understood"),
    ("support/pairs.py", "counts[\"a prompt without two videos that can be read\"] += not pairs", "pass",
     PAIRS + " -k costs"),
    ("support/pairs.py", "check_out(args.pairs, args.videos)", "pass", PAIRS + " -k written_over"),
    ("support/tables.py", "statistics.pstdev(scores) if", "statistics.stdev(scores) if", PAIRS + " -k whose"),
    ("support/probe.py", "clip.frames.flip(0)", "clip.frames", PROBE + " -k each_way"),
    ("support/probe.py", "clip.frames[:1]", "clip.frames[-1:]", PROBE + " -k each_way"),
    ("support/probe.py", "[s / 2 for s", "[s * 2 for s", PROBE + " -k each_way"),
    ("support/probe.py", "_replace(prompt=\"\")", "_replace(prompt=other)", PROBE + " -k each_way"),
    ("support/probe.py", "_replace(prompt=other)", "_replace(prompt=\"\")", PROBE + " -k each_way"),
    ("support/probe.py", "cots.get(partners[key])", "cot", PROBE + " -k each_way"),
    ("support/probe.py", "others.get(key[1]), []", "key[1], []", PROBE + " -k each_way"),
    ("support/probe.py", "1: 0, 2: 0, \"N/A\": 1", "1: 1, 2: 0, \"N/A\": 1", PROBE + " -k each_way"),
    ("support/probe.py", "thought = put(line, str(value), thought)", "pass", PROBE + " -k falsified"),
    ("support/probe.py", "!= wanted:", "== {}:", PROBE + " -k falsified"),
    ("support/probe.py", "generator.randrange(1, ", "generator.randrange(0, ", PROBE + " -k never"),
    ("support/probe.py", "if name in EXCHANGED else \"own\"", "if False else \"own\"", PROBE + " -k figures"),
    ("support/probe.py", "if pair.human and", "if", PROBE + " -k ties"),
    ("support/probe.py", "(a > b) - (a < b) == pair.human", "(a > b) == (pair.human > 0)",
     PROBE + " -k ties"),
    ("support/probe.py", "(std or math.nan)**2", "(std or math.nan)", PROBE + " -k figures"),
    ("support/probe.py", "found.var()", "found.std()", PROBE + " -k figures"),
    ("support/probe.py", "index_add(0, where, values)", "index_add(0, where, values / 2)",
     PROBE + " -k drawn"),
    ("support/probe.py", "if len(numbers) < 2:", "if len(numbers) < 1:", PROBE + " -k drawn"),
    ("support/probe.py", "if is_release(model) and own_size:", "if False:", PROBE + " -k that_of_judge"),
    ("support/probe.py", "[clip[-1].seconds for", "[[0.0] * len(clip[-1].seconds) for",
     PROBE + " -k that_of_judge"),
    # -- videos in memory, the server, adapters
    ("data.py", "fits = frames.dtype == torch.uint8 and", "fits =", MEMORY + " -k one_type"),
    ("data.py", "odd = T % s.temporal_patch_size or", "odd =", MEMORY + " -k one_type"),
    ("data.py", "any(length % side for length in frames.shape[2:])", "False", MEMORY + " -k one_type"),
    ("support/memory.py", "[index / self.fps for", "[index / 4.0 for", MEMORY + " -k files_score"),
    ("support/memory.py", "super().__init__(len(arrays), fps, map(content, arrays))",
     "super().__init__(len(arrays), fps, ())", MEMORY + " -k told_apart"),
    ("support/memory.py", "super().__init__(len(arrays), fps, map(content, arrays))",
     "super().__init__(len(arrays), fps, map(content, arrays[:1]))", MEMORY + " -k told_apart"),
    ("support/memory.py", "(type(self).__name__, total, fps)", "(type(self).__name__, total)",
     MEMORY + " -k told_apart"),
    ("support/memory.py", "array.dtype}{array.shape}", "array.dtype}", MEMORY + " -k told_apart"),
    ("support/memory.py", "json.dumps([name, prompt])", "json.dumps([prompt])", MEMORY + " -k told_apart"),
    ("support/memory.py", "if self.problem:", "if False:", MEMORY + " -k unusable"),
    ("support/memory.py", "if picture.shape != size:", "if False:", SERVE + " -k two_sizes"),
    ("support/memory.py", "self.waiting.extend(request for", "(request for", MEMORY + " -k interrupted"),
    ("support/memory.py", "setdefault(repr(request[1]), [])", "setdefault(None, [])", MEMORY + " -k own"),
    ("support/memory.py", "islice(found, len(some))", "islice(found, 1)", MEMORY + " -k callers"),
    ("support/memory.py", "        with self.lock:\n            if not answer.done():",
     "        if True:\n            if not answer.done():", MEMORY + " -k callers"),
    ("infer.py", "numbers=[memory.number_of(key) for key in keys]", "numbers=None",
     MEMORY + " -k depend"),
    ("infer.py", "keys = list(dict.fromkeys(asked))", "keys = asked", MEMORY + " -k twice"),
    ("infer.py", "with torch.autocast(model.device.type, enabled=False):", "if True:",
     MEMORY + " -k precision"),
    ("infer.py", "    model.check_head()\n    asked", "    asked", MEMORY + " -k without_a_head"),
    ("support/tables.py", "if not math.isfinite(found[\"score\"]):", "if False:",
     MEMORY + " -k none_is"),
    ("support/tables.py", "    if standardise:", "    if True:", MEMORY + " -k standardised"),
    ("support/client.py", "return np.array(frame, np.uint8, order=\"C\")",
     "return np.array(frame, np.uint8, order=\"C\")[:, ::-1].copy()", MEMORY + " -k files_score"),
    ("support/client.py", "np.rint(frame.astype(", "np.floor(frame.astype(", MEMORY + " -k files_score"),
    ("support/client.py", "if not (low >= 0 and high <= 1):", "if low < 0 or high > 1:",
     MEMORY + " -k unusable"),
    ("support/client.py", "if len(fits) != 1:", "if not fits:", MEMORY + " -k layout"),
    ("support/client.py", '"CTHW": (1, 2, 3, 0)', '"CTHW": (1, 3, 2, 0)', MEMORY + " -k files_score"),
    ("support/client.py", "if rate is None and in_memory:", "if False:", MEMORY + " -k no_sense"),
    ("support/client.py", " and not isinstance(rate, bool)", "", MEMORY + " -k no_sense"),
    ("support/client.py", "if error.code != 503:", "if True:", SERVE + " -k queue"),
    ("support/client.py", "urllib.request.ProxyHandler({})", "", SERVE + " -k numpy_alone"),
    ("support/client.py", "filtered[1:, 1:] = rows[1:] - rows[:-1]", "filtered[1:, 1:] = rows[1:]",
     SERVE + " -k lose_nothing"),
    ("support/serve.py", "if self.held >= self.args.queue:", "if False:", SERVE + " -k queue"),
    ("support/serve.py", "            self.held -= 1", "            pass", SERVE + " -k queue"),
    ("support/serve.py", "if taken > most:", "if False:", SERVE + " -k bodies_have"),
    ("support/serve.py", "if not path.is_relative_to(root):", "if False:", SERVE + " -k one_folder"),
    ("support/serve.py", "(root / turn.video_path).resolve()", "(root / turn.video_path).absolute()",
     SERVE + " -k one_folder"),
    ("support/serve.py", "check_pixels(*image.size, self.max_pixels)", "pass", SERVE + " -k unusable"),
    ("support/serve.py", "check_length(len(texts), self.args)", "pass", SERVE + " -k too_many"),
    ("support/serve.py", "check_length(open_file(path).total, args)", "pass", SERVE + " -k files_have"),
    ("support/serve.py", 'formats=("PNG",)', "formats=None", SERVE + " -k bad_frame"),
    ("support/serve.py", "return {\"rewards\": rewards, \"errors\"",
     "return {\"rewards\": rewards[::-1], \"errors\"", SERVE + " -k flow_factory"),
    ("support/serve.py", "if r[\"error\"] is None else self.args.unusable for r", "for r",
     SERVE + " -k queue"),
    ("support/serve.py", "request.history[-1] for request", "request.history[0] for request",
     SERVE + " -k unirl"),
    ("support/serve.py", "room = BODIES * most - self.bytes", "room = most", SERVE + " -k together"),
    ("support/serve.py", "kept = kept and taken <= most and len(chunk) <= room", "kept = taken <= most",
     SERVE + " -k together"),
    ("support/serve.py", "else:  # what will not be used", "elif False:  # what will not be used",
     SERVE + " -k make_room"),
    ("support/serve.py", "            self.held -= 1\n            self.bytes -= len(body)",
     "            self.held -= 1", SERVE + " -k together"),
    ("support/serve.py", "ThreadPoolExecutor(args.queue)", "ThreadPoolExecutor(1)", SERVE + " -k together"),
    ("support/serve.py", "if packets > 2 * args.max_frames:", "if False:", SERVE + " -k decoded"),
    ("support/serve.py", "(b\",\", b\"[\", b\"{\")", "(b\"[\", b\"{\")", SERVE + " -k small_values"),
    ("support/client.py", "except TimeoutError:", "except ZeroDivisionError:", SERVE + " -k may_help"),
    ("support/batches.py", ", generator=torch.Generator()", "", MEMORY + " -k random"),
    ("support/adapters.py", "if record[\"error\"] is not None and unusable is None:", "if False:",
     ADAPTERS + " -k unusable"),
    ("support/adapters.py", "videos, prompts, unusable, fps=fps, layout=\"TCHW\")\n            return",
     "videos, prompts, unusable, fps=fps)\n            return", ADAPTERS + " -k riddle"),
    ("support/adapters.py", "if not use_norm:", "if use_norm:", ADAPTERS + " -k dance"),
    ("support/adapters.py", "use_tensor_inputs = True", "use_tensor_inputs = False",
     ADAPTERS + " -k flow_factory"),
    ("support/adapters.py", "(extra_info or {}).get(\"fps\") if fps is None else fps", "fps",
     ADAPTERS + " -k verl"),
]


def planted(folder: Path, mutant: tuple[str, str, str, str]) -> str:
    """Run a mutant's tests on a copy of the project: "killed", "survived", or what went wrong."""
    file, old, new, tests = mutant
    path = folder / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
    words = tests.split(" -k ")
    command += [words[0], *(["-k", words[1]] if len(words) > 1 else [])]
    try:
        done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=900)
    finally:
        path.write_text(text, encoding="utf-8")
    found = {0: "survived", 1: "killed"}.get(done.returncode)
    return found or f"error {done.returncode}: {done.stdout[-500:]} {done.stderr[-500:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="those whose file, texts or tests hold this")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the project at work")
    args = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if args.only in " ".join(mutant)]
    for file, old, _, _ in MUTANTS:
        count = (ROOT / file).read_text(encoding="utf-8").count(old)
        if count != 1:
            raise SystemExit(f"{file}: {old!r} stands there {count} times, not once")
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(files, cwd=ROOT, capture_output=True, text=True, check=True)
    folders, results, started = Queue(), [], time.time()
    with tempfile.TemporaryDirectory() as beside:
        for job in range(args.jobs):
            for name in filter(None, files.stdout.split("\n")):
                if (ROOT / name).is_file():
                    copy = Path(beside, str(job), name)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / name, copy)
            folders.put(Path(beside, str(job)))

        def work(mutant: tuple[str, str, str, str]) -> None:
            folder = folders.get()
            try:
                results.append((planted(folder, mutant), mutant))
            finally:
                folders.put(folder)
            result, (file, old, new, _) = results[-1]
            print(f"{result:9} {file}: {old!r} -> {new!r}", flush=True)

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, mutants))
    killed = sum(result == "killed" for result, _ in results)
    print(f"{killed} of {len(results)} killed in {time.time() - started:.0f} s")
    for result, (file, old, new, tests) in results:
        if result != "killed":
            print(f"  {result}: {file}: {old!r} -> {new!r} ({tests})")
    raise SystemExit(killed < len(results))


if __name__ == "__main__":
    main()
