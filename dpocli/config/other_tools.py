"""Names known from other tools (TRL, transformers, Axolotl, LLaMA-Factory, alignment-handbook), converted in words.

They are not aliases: the meaning differs often enough (per device or in all, steps or a share) that guessing would
train something else than was meant. A test holds every flag named here to be one that exists.
"""

from collections.abc import Mapping

_BATCH_SIZE = (
    "--batch-size counts pairs per optimizer step over all processes: multiply per_device_train_batch_size by "
    "gradient_accumulation_steps and by the number of processes. How a batch is cut up for memory is --token-budget"
)

_MEMORY = "passes are cut by tokens, not by pairs, and change no value: see --token-budget"

_WARMUP = "use --warmup-steps (or --warmup-ratio, a share of the steps)"

_DTYPE = "use --dtype bfloat16, --dtype float16 or --dtype float32 (float32 master weights are kept in any case)"

_NO_AUTOCAST = "autocast is never used; " + _DTYPE

_MODEL = "use --model (a local directory or a hub id)"

_REFERENCE_MODEL = (
    "the reference model is scored once, beforehand: dpocli precompute --model REFERENCE --data … --out ref/, "
    "then dpocli train --reference ref/"
)

_DATA = "use --data (a file, a directory or a data set; repeatable)"

_OUT = "use --out"

_LENGTH = "--max-length bounds prompt + the longer side, and --truncation says what gives way; there is no other limit"

_FRACTION = (
    "held-out pairs come from --eval-reference (a cache of their own) or --eval-fraction (a share of the prompts)"
)

_SCHEDULE = "use --lr-schedule linear, cosine or constant"

_LOSS_FREE = "choose a loss that needs no reference: --loss simpo or --loss dpo_reference_free"

_GAMMA = "--gamma is the target reward margin of --loss simpo as in the paper"

_WEIGHTED_SUM = "write a weighted sum: --loss dpo+0.2*sft"

_ALPHA = (
    "each has a name of its own: --alphapo-alpha, --r-dpo-alpha, --beta-dpo-alpha, --ld-alpha, --f-alpha; the weight of a "
    "likelihood term is --sft-weight"
)

_AUTOMATIC = "there is nothing to set: checkpoints are found and a run goes on when the same line is given again"

_SKIP = "leave it out: "

_OPTIMIZER = (
    "use --optimizer adamw, --optimizer adamw-8bit or --optimizer rmsprop (--adam-beta1, --adam-beta2 and --adam-epsilon are "
    "settings of the first two)"
)

FOREIGN_OPTIONS: Mapping[str, str] = {
    # model
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "base_model": _MODEL,
    "pretrained": _MODEL,
    "model_path": _MODEL,
    "policy": _MODEL,
    "model_revision": "use --revision",
    "ref_model": _REFERENCE_MODEL,
    "ref_model_name_or_path": _REFERENCE_MODEL,
    "reference_model": _REFERENCE_MODEL,
    "rl_adapter_ref_model": _REFERENCE_MODEL,
    "precompute_ref_log_probs": _REFERENCE_MODEL,
    "precompute_ref_batch_size": _MEMORY,
    "sync_ref_model": "a reference that moves is not supported: the cache holds a frozen one; leave it out",
    "ref_adapter_name": _REFERENCE_MODEL,
    "bf16": "use --dtype bfloat16: " + _NO_AUTOCAST,
    "fp16": "use --dtype float16: " + _NO_AUTOCAST,
    "fp32": "use --dtype float32",
    "mixed_precision": _NO_AUTOCAST,
    "precision": _DTYPE,
    "torch_dtype": _DTYPE,
    "compute_dtype": _DTYPE,
    "tf32": _DTYPE,
    "disable_dropout": "dropout is off unless --model-dropout is given",
    "dropout": "dropout is off unless --model-dropout is given",
    "gradient_checkpointing_kwargs": "--gradient-checkpointing is all there is to set",
    "router_aux_loss": "use --router-aux-loss-coef",
    # data
    "dataset": _DATA,
    "datasets": _DATA,
    "dataset_name": _DATA,
    "dataset_mixer": _DATA,
    "dataset_path": _DATA,
    "dataset_dir": _DATA,
    "train_file": _DATA,
    "data_path": _DATA,
    "input": _DATA,
    "dataset_split": "use --data-split",
    "dataset_train_split": "use --data-split",
    "dataset_splits": "use --data-split",
    "split": "use --data-split",
    "dataset_test_split": _FRACTION,
    "eval_dataset": _FRACTION,
    "eval_data": _FRACTION,
    "val_size": _FRACTION,
    "val_set_size": _FRACTION,
    "test_size": _FRACTION,
    "max_samples": "use --limit",
    "max_train_samples": "use --limit",
    "max_prompt_length": _LENGTH,
    "max_completion_length": _LENGTH,
    "max_target_length": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "cutoff_len": _LENGTH,
    "sequence_len": _LENGTH,
    "truncation_mode": "use --truncation keep-start, keep-end or drop",
    "truncation_side": "use --truncation keep-start, keep-end or drop",
    "chosen_key": "use --chosen-field",
    "rejected_key": "use --rejected-field",
    "prompt_key": "use --prompt-field",
    "input_key": "use --prompt-field",
    "cache_dir": "large temporary files go to --scratch; models come from a local directory or the hub's own cache",
    # loss
    "loss_type": "use --loss (sigmoid is called dpo, sigmoid_norm dpo_norm, aot_pair aot_unpaired; the others have their names)",
    "pref_loss": "use --loss (sigmoid is called dpo; the others have their names)",
    "rl": "use --loss",
    "dpo_beta": "use --beta",
    "rl_beta": "use --beta",
    "pref_beta": "use --beta",
    "tau": "use --beta (the tau of ipo)",
    "dpo_label_smoothing": "use --label-smoothing",
    "label_smoothing_factor": "use --label-smoothing (the share of pairs whose label is flipped)",
    "simpo_gamma": _GAMMA + ": the same number",
    "gamma_beta_ratio": _GAMMA + ": multiply gamma_beta_ratio by --beta",
    "simpo_gamma_beta_ratio": _GAMMA + ": multiply the ratio by --beta",
    "reference_free": _LOSS_FREE,
    "ipo": "use --loss ipo",
    "use_weighting": "use --weighting wpo",
    "loss_weights": _WEIGHTED_SUM,
    "rpo_alpha": "use --loss rpo with --sft-weight, or " + _WEIGHTED_SUM,
    "cpo_alpha": "use --loss cpo with --sft-weight",
    "nll_loss_coef": "use --loss rpo with --sft-weight",
    "pref_ftx": "use --loss rpo with --sft-weight, or " + _WEIGHTED_SUM,
    "pref_bco_weight": "write a weighted sum: --loss dpo+0.5*bco_pair",
    "simpo_hinge": "use --loss simpo_hinge",
    "lambda_coef": "use --sft-weight",
    "orpo_alpha": "use --beta (the lambda of orpo)",
    "f_divergence_type": "use --f-divergence",
    "f_alpha_divergence_coef": "use --f-alpha: the paper's alpha, which is 1 - alpha in TRL 1.x",
    "lambda_dpop": "use --dpop-lambda",
    "dpo_lambda": "use --dpop-lambda",
    "alpha": _ALPHA,
    "gap_mean": _SKIP + "the running mean margin of beta_dpo is learned",
    # optimization
    "lr": "use --learning-rate",
    "peak_lr": "use --learning-rate",
    "actor_learning_rate": "use --learning-rate",
    "per_device_train_batch_size": _BATCH_SIZE,
    "gradient_accumulation_steps": _BATCH_SIZE,
    "train_batch_size": _BATCH_SIZE,
    "micro_batch_size": _BATCH_SIZE,
    "micro_train_batch_size": _BATCH_SIZE,
    "global_batch_size": "use --batch-size, which counts pairs per optimizer step over all processes",
    "per_device_eval_batch_size": _MEMORY,
    "eval_batch_size": _MEMORY,
    "auto_find_batch_size": _MEMORY,
    "num_train_epochs": "use --epochs",
    "num_epochs": "use --epochs",
    "n_epochs": "use --epochs",
    "max_epochs": "use --epochs",
    "max_train_steps": "use --max-steps",
    "train_steps": "use --max-steps",
    "num_warmup_steps": _WARMUP,
    "lr_warmup_steps": _WARMUP,
    "lr_warmup_ratio": "use --warmup-ratio",
    "lr_scheduler": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "lr_scheduler_kwargs": _SCHEDULE,
    "optim": _OPTIMIZER,
    "optim_args": _OPTIMIZER,
    "adam_beta_1": "use --adam-beta1",
    "adam_beta_2": "use --adam-beta2",
    "max_norm": "use --max-grad-norm",
    "grad_clip": "use --max-grad-norm",
    "gradient_clipping": "use --max-grad-norm",
    "data_seed": "--seed sets the order of the data too",
    # held-out evaluation, logging, saving
    "do_train": _SKIP + "dpocli train is the command",
    "do_eval": _FRACTION,
    "eval_steps": "use --eval-every (steps)",
    "eval_strategy": "use --eval-every (steps)",
    "evaluation_strategy": "use --eval-every (steps)",
    "logging_steps": "use --log-every (steps)",
    "logging_strategy": "use --log-every (steps)",
    "save_steps": "use --save-every (steps)",
    "save_strategy": "use --save-every (steps)",
    "save_total_limit": "use --keep-last (checkpoints)",
    "load_best_model_at_end": "use --keep-best loss or --keep-best accuracy: OUT/model is then the best one",
    "metric_for_best_model": "use --keep-best loss or --keep-best accuracy (both held-out)",
    "early_stopping_patience": "use --early-stopping (evaluations)",
    "report_to": "use --track tensorboard or --track wandb (metrics.jsonl is always written)",
    "output": _OUT,
    "output_dir": _OUT,
    "out_dir": _OUT,
    "save_path": _OUT,
    "logging_dir": "everything is written under --out",
    "run_name": "the directory of --out is the name of the run",
    "overwrite_output_dir": "nothing is ever overwritten: give --out another directory",
    "resume_from_checkpoint": _AUTOMATIC,
    "resume": _AUTOMATIC,
    "num_workers": _SKIP + "for more workers start precompute several times with --shard 0/N, --shard 1/N, …",
    "dataloader_num_workers": _SKIP + "rows are read in the background anyway",
    "dataset_num_proc": _SKIP + "for more workers start precompute several times with --shard 0/N, --shard 1/N, …",
    "remove_unused_columns": _SKIP + "columns are carried along only where --keep-columns names them",
    "use_cpu": "use --device cpu",
    "no_cuda": "use --device cpu",
}
"""Option elsewhere (with underscores) → what to do here."""

FOREIGN_LOSSES: Mapping[str, str] = {
    "sigmoid": "it is called dpo here",
    "sigmoid_norm": "it is called dpo_norm here",
    "dpo_sigmoid": "it is called dpo here",
    "cdpo": "it is dpo with --label-smoothing",
    "length_normalized_dpo": "it is called dpo_norm here",
    "dpo_length_normalized": "it is called dpo_norm here",
    "reference_free": "it is called dpo_reference_free here",
    "rso": "it is called hinge here",
    "ipo_pair": "it is called ipo here",
    "exo": "it is called exo_pair here",
    "nca": "it is called nca_pair here",
    "bco": "it is called bco_pair here",
    "sppo": "it is called sppo_hard here",
    "apo": "it is called apo_zero or apo_down here",
    "aot_pair": "it is called aot_unpaired here, as in TRL 1.x",
    "rdpo": "it is called robust here, or r_dpo for the length-regularised loss",
    "ld_dpo": "it is dpo with --ld-alpha",
    "f_dpo": "it is dpo with --f-divergence",
    "smaug": "it is called dpop here",
    "nll": "it is called sft here",
    "cpo_simpo": "write the sum simpo+sft here",
    "dpo_nll": "it is called rpo here",
    "irpo": "it is called rpo here",
    "caldpo": "it is called cal_dpo here",
    "lrml": "it is called discopop here",
}
"""Value of `loss_type` elsewhere → what it is called here."""

_FULL_VOCABULARY = (
    "takes the KL divergence over the whole vocabulary at every position, and a cache of the sampled tokens' log-probs "
    "does not hold it; nearest here is dpo with --f-divergence"
)

_MOVING = (
    "moves its reference while it trains, and a cache holds a frozen one; nearest here is a new precompute between runs"
)

_UNPAIRED = (
    "learns from single answers and estimates a KL divergence on answers of other prompts; nearest here are bco_pair and "
    "apo_zero, which judge each side of a pair by itself"
)

REFUSED_LOSSES: Mapping[str, str] = {
    "tr_dpo": _MOVING,
    "trdpo": _MOVING,
    "tr_ipo": _MOVING,
    "tdpo": _FULL_VOCABULARY,
    "tdpo1": _FULL_VOCABULARY,
    "tdpo2": _FULL_VOCABULARY,
    "kto": _UNPAIRED,
    "kto_pair": _UNPAIRED,
    "apo_zero_unpaired": _UNPAIRED,
    "online_dpo": "draws its answers while it trains, and a cache holds those of the data; use another trainer for it",
    "xpo": "draws its answers while it trains, and a cache holds those of the data; use another trainer for it",
}
"""Losses that no such cache can serve → why. Completes the sentence that begins with the name."""


def foreign_option(name: str) -> str | None:
    """What to do here about an option of another tool, in words; None if it is not known."""
    return FOREIGN_OPTIONS.get(name.lower().replace("-", "_"))


def foreign_loss(name: str) -> str | None:
    """What another tool's loss is called here, in words; None if it is not known."""
    return FOREIGN_LOSSES.get(name.lower().replace("-", "_"))
