"""Bad input, by name: each start ends with exit code 2 on every rank and one line from rank 0, and loses nothing."""

# ruff: noqa: E501 - the cases are a table

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from strategies.testing import Workers
from tests.starts import Start, digests, start
from tests.trainer.jobs import ROWS, TINY
from trainer.complaints import options

ROOT = Path(__file__).parents[1]
MOST_S = 20.0


@dataclass(frozen=True)
class Bad:
    """A start that must be refused."""

    words: str
    """Its arguments, apart from blanks; `{files}` is the folder of `files`, `{run}` that of a finished run."""
    says: tuple[str, ...]
    """Parts of its one line."""
    without: str = ""
    """Groups of settings that are left out of the base."""
    fresh: bool = False
    """In a folder of its own, where no earlier checkpoint is in the way."""
    variables: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    trainer: str = "Trainer"


def bad(words: str, *says: str, without: str = "", fresh: bool = False, sizes: tuple[int, ...] = (1, 2)) -> Bad:
    return Bad(words, says, without=without, fresh=fresh, sizes=sizes)


def launched(*says: str, unset: tuple[str, ...] = (), **variables: str) -> Bad:
    """Started with other variables. Ranks that don't know who they are each say it."""
    return Bad("", says, variables=variables, unset=unset, sizes=(1,))


def jsonl(words: str, *says: str) -> Bad:
    return bad(f"data=jsonl data.length=16 {words}", *says, without="data", fresh=True)


def tokens(words: str, *says: str) -> Bad:
    return bad(f"data=tokens data.length=16 {words}", *says, without="data", fresh=True)


def model(words: str, *says: str) -> Bad:
    return bad(f"model=hf {words}", *says, without="model")


def of_class(name: str, words: str, *says: str) -> Bad:
    return Bad(words, says, without="model data", trainer=name, fresh=True)


NO_VALIDATION = "data.validation=0 trainer.eval_samples=null"
LABELS = "data.files=[{files}/rows.jsonl] data.packing=none"

KEYS = {
    "key_of_the_root_mistyped": bad("stratgy=ddp", "'stratgy'", "Nearest: strategy"),
    "key_of_the_trainer_mistyped": bad("trainer.max_step=3", "'trainer.max_step'", "max_steps"),
    "key_added_with_a_plus": bad("+optimizer.lrate=3", "optimizer.lrate", "lr,"),
    "key_two_levels_down_mistyped": bad("model.lora.rnk=8", "model.lora.rnk", "Nearest: rank"),
    "key_of_the_model_itself_mistyped": bad("model.config.hiden_size=8", "model.config.hiden_size", "hidden_size"),
    "key_of_the_data_mistyped": bad("data.lenght=8", "data.lenght", "Nearest: length"),
    "key_of_a_hook_mistyped": bad("hooks=[samples] hooks.samples.lenght=4", "hooks.samples.lenght", "length"),
    "key_of_a_logger_mistyped": bad("logger=[csv] logger.csv.fil=a", "logger.csv.fil", "Nearest: file"),
    "key_in_a_mixture_mistyped": bad("data=mixture data.sources.code.lenght=1", "data.sources.code.lenght", "length", without="data"),
    "choice_of_a_strategy_mistyped": bad("strategy=dpp", "strategy=dpp", "Nearest: ddp"),
    "choice_of_data_mistyped": bad("data=txt", "data=txt", "Nearest: text"),
    "choice_of_a_hook_mistyped": bad("hooks=[sampels]", "hooks=sampels", "Nearest: samples"),
    "choice_of_an_experiment_unknown": bad("experiment=nothing", "experiment=nothing", "lora_answers"),
    "choice_of_null": bad("optimizer=null", "optimizer=null", "adamw"),
    "choice_of_two_where_one_is_needed": bad("strategy=[ddp,single]", "strategy=[ddp,single]", "one of them"),
    "choice_of_a_number": bad("logger=0", "logger=0", "tensorboard", "(logger)"),
    "choice_taken_away": bad("~optimizer", "optimizer", "Choose one", "adamw"),
    "settings_of_a_hook_not_chosen": bad("+hooks.mine.x=3", "hooks.mine", "hooks=[mine]"),
    "settings_of_a_logger_not_chosen": bad("+logger.mine.x=3", "logger.mine", "logger=[mine]"),
    "logger_named_twice": bad("logger=[csv,csv]", "logger=[csv,csv]", "each once"),
}  # fmt: skip

WORDS = {
    "flag_unknown": bad("--epochs=3", "--epochs=3", "key=value"),
    "word_alone": bad("train", "'train'", "key=value"),
    "word_empty": bad("''", "''", "key=value"),
    "word_of_an_equals_sign": bad("=", "'='", "key=value"),
    "word_without_key": bad("=3", "'=3'", "key=value"),
    "bracket_open": bad("strategy.hook=[", "strategy.hook=[", "quotes"),
    "quote_open": bad("run.name='abc", "run.name='abc", "quotes"),
    "brace_open": bad("model.config={a:1", "model.config={a:1", "quotes"),
    "letters_beyond_ascii_unquoted": bad("run.dir=/tmp/é漢字", "é漢字", "quotes"),
    "several_values": bad("seed=1,2", "seed=1,2", "several values", "[1,2]"),
    "interpolation_to_nowhere": bad("optimizer.lr=${nope}", "optimizer.lr", "'nope'"),
    "interpolation_in_a_circle": bad("seed=${seed}", "seed", "ecursive"),
    "interpolation_unknown": bad("cache=${nothing:x}", "cache", "nothing"),
    "value_left_open": bad("seed=???", "seed has no value"),
    "group_without_what_it_needs": bad("data=hub", "needs files", "data.path", without="data"),
}  # fmt: skip

VALUES = {
    "type_text_for_a_number": bad("trainer.max_steps=many", "trainer.max_steps", "'many'", "Integer"),
    "type_fraction_for_a_whole_number": bad("trainer.global_batch=1.5", "trainer.global_batch", "1.5"),
    "type_list_for_a_number": bad("optimizer.lr=[1]", "optimizer.lr", "[1]"),
    "type_word_for_a_switch": bad("compile=maybe", "compile", "maybe", "bool"),
    "type_dictionary_for_a_text": bad("run.dir={a:1}", "run.dir"),
    "type_null_where_a_value_is_needed": bad("cache=null", "cache", "Optional"),
    "choice_of_a_value_unknown": bad("data.packing=window", "data.packing", "'window'", "windows"),
    "steps_zero": bad("trainer.max_steps=0", "max_steps=0", "not positive", "trainer.max_steps"),
    "limits_all_null": bad("trainer.max_steps=null", "nothing says when to end", "trainer.max_steps", "max_time"),
    "lr_negative": bad("optimizer.lr=-1", "lr=-1", "optimizer.lr"),
    "lr_not_a_number": bad("optimizer.lr=nan", "lr=nan", "optimizer.lr"),
    "lr_infinite": bad("optimizer.lr=inf", "lr=inf", "finite", "optimizer.lr"),
    "weight_decay_infinite": bad("optimizer.weight_decay=inf", "weight_decay=inf", "optimizer.weight_decay"),
    "beta_of_one": bad("optimizer.beta2=1.0", "beta2=1.0", "[0, 1)", "optimizer.beta2"),
    "clip_zero": bad("trainer.clip_norm=0", "clip_norm=0", "null", "trainer.clip_norm"),
    "clip_infinite": bad("trainer.clip_norm=inf", "clip_norm=inf", "null", "trainer.clip_norm"),
    "average_of_everything": bad("trainer.ema_decay=1", "ema_decay=1", "0.999", "trainer.ema_decay"),
    "seed_negative": bad("seed=-1", "seed=-1", "(seed)"),
    "seed_of_thirty_digits": bad("seed=123456789012345678901234567890", "seed=1234567890", "(seed)"),
    "time_in_words": bad("trainer.max_time=soon", "max_time='soon'", "30m", "trainer.max_time"),
    "time_infinite": bad("trainer.max_time=1e999", "max_time", "trainer.max_time"),
    "grace_in_words": bad("trainer.grace=never", "grace='never'", "trainer.grace"),
    "hang_at_once": bad("trainer.hang_timeout=1", "hang_timeout=1 ", "15m", "null", "trainer.hang_timeout"),
    "meeting_of_no_time": bad("backend.meeting_s=0", "meeting_s=0", "backend.meeting_s"),
    "batch_of_a_trillion": bad("trainer.global_batch=1000000000000 trainer.micro_batch=1", "1000000000000", "trainer.global_batch"),
    "length_zero": bad("data.length=0", "length=0", "data.length"),
    "share_of_all_for_validation": bad("data.validation=1", "validation=1.0", "data.validation"),
    "workers_by_the_thousands": bad("data.workers=100000", "workers=100000", "CPUs", "data.workers"),
    "checkpoint_every_zero": bad("checkpoint.every=0", "every=0", "checkpoint.every"),
    "checkpoint_keep_negative": bad("checkpoint.keep=-1", "keep=-1", "checkpoint.keep"),
    "checkpoint_folder_empty": bad("checkpoint.folder=''", "folder=''", "checkpoint.folder"),
    "checkpoint_folder_of_unknown_kind": bad("checkpoint.folder=nosuch://b/x", "nosuch://b/x", "checkpoint.folder"),
    "timeout_zero": bad("backend.timeout_s=0", "timeout_s=0", "backend.timeout_s"),
    "bucket_negative": bad("strategy.bucket_mb=-1", "bucket_mb=-1", "strategy.bucket_mb"),
    "bucket_infinite": bad("strategy.bucket_mb=inf", "bucket_mb=inf", "strategy.bucket_mb"),
    "patience_zero": bad("hooks=[early_stopping] hooks.early_stopping.patience=0", "patience=0", "hooks.early_stopping.patience"),
    "temperature_infinite": bad("hooks=[samples] hooks.samples.temperature=inf", "temperature=inf", "hooks.samples.temperature"),
    "warmup_of_steps_and_a_half": bad("schedule.warmup=1.5", "warmup=1.5", "schedule.warmup"),
    "final_rate_of_two": bad("schedule.final_ratio=2", "final_ratio=2", "schedule.final_ratio"),
    "logger_file_is_another_file": bad("logger=[csv] logger.csv.file=metrics.jsonl", "'metrics.jsonl'", "logger.csv.file"),
    "logger_file_outside": bad("logger=[csv] logger.csv.file=../up.csv", "'../up.csv'", "logger.csv.file"),
    "logger_folder_taken": bad("logger=[tensorboard] logger.tensorboard.directory=checkpoints", "'checkpoints'", "logger.tensorboard.directory"),
    "model_without_layers": bad("model.config.num_hidden_layers=0", "num_hidden_layers=0", "model.config.num_hidden_layers"),
    "model_heads_do_not_divide": bad("model.config.num_attention_heads=3", "(16)", "(3)", "model.config"),
    "model_size_in_words": bad("model.config.hidden_size=big", "hidden_size", "'big'", "model.config"),
    "model_dropout_of_two": bad("model.config.attention_dropout=2", "attention_dropout=2", "model.config.attention_dropout"),
    "model_activation_unknown": bad("model.config.hidden_act=geluu", "'geluu'", "(model)"),
}  # fmt: skip

CONTRADICTIONS = {
    "micro_batch_does_not_divide": bad("trainer.micro_batch=5", "global_batch=12", "micro_batch=5", "trainer.micro_batch"),
    "batch_does_not_divide_by_ranks": bad("trainer.global_batch=7 trainer.micro_batch=null", "7", "2", "6 or 8", "trainer.global_batch", sizes=(2,)),
    "single_with_two_processes": bad("strategy=single", "strategy=single", "2 processes", "(strategy)", sizes=(2,)),
    "evaluation_every_without_validation": bad(f"{NO_VALIDATION} trainer.eval_every=2", "eval_every=2", "data.validation"),
    "evaluation_samples_without_validation": bad("data.validation=0", "eval_samples=8", "data.validation"),
    "stopping_early_without_validation": bad(f"{NO_VALIDATION} hooks=[early_stopping]", "EarlyStopping", "eval_every"),
    "stopping_early_at_the_end": bad("hooks=[early_stopping] trainer.eval_every=null", "eval_every=null", "hooks.early_stopping"),
    "best_without_validation": bad(f"{NO_VALIDATION} checkpoint.keep_best=val_loss checkpoint.every=2", "keep_best=val_loss"),
    "best_never_measured_when_saved": bad("checkpoint.keep_best=val_loss checkpoint.every=2 trainer.eval_every=3", "keep_best=val_loss", "every=2", "eval_every=3"),
    "best_mode_without_best": bad("checkpoint.keep_best_mode=max", "keep_best_mode=max", "checkpoint.keep_best"),
    "keep_every_between_checkpoints": bad("checkpoint.every=4 checkpoint.keep_every=6", "keep_every=6", "every=4", "checkpoint.keep_every"),
    "keep_all_and_the_best": bad("checkpoint.keep=0 checkpoint.keep_best=val_loss", "keep=0", "checkpoint.keep"),
    "sharing_of_a_bucket": bad("checkpoint.folder=s3://b/x checkpoint.sharing=local", "sharing=local", "s3://b/x", "checkpoint.sharing"),
    "warmup_longer_than_the_run": bad("schedule.warmup=100", "warmup=100", "run of 4 steps", "schedule.warmup"),
    "warmup_and_decay_overlap": bad("schedule=wsd schedule.warmup=0.5 schedule.decay=0.8", "decay", "run of 4", "schedule.decay"),
    "schedule_needs_a_length": bad("trainer.max_steps=null trainer.max_time=1h", "CosineSchedule", "trainer.max_steps"),
    "half_precision_that_stops": bad("precision=fp16 trainer.on_nonfinite=stop", "on_nonfinite=stop", "precision=fp16"),
    "loss_scale_without_half_precision": bad("precision.loss_scale=5", "loss_scale=5", "fp32", "precision.loss_scale"),
    "precision_that_the_device_lacks": bad("precision=tf32", "tf32", "cpu", "(precision)"),
    "backend_that_the_machine_lacks": bad("backend=nccl", "NCCL", "CUDA", "(backend)"),
    "backend_of_machines_of_aws": bad("backend=smddp", "torch 2.4.1", "CUDA 12.1", "backend=nccl", "(backend)"),
    "backend_over_a_fabric_that_is_missing": bad("backend=efa", "EFABackend", "fi_info", "backend.allow_tcp=true"),
    "backend_of_trainium": bad("backend=neuron", "torch-neuronx", "backend=efa", "(backend)"),
    "backend_with_odd_variables": bad("backend=efa +backend.env={'a b': 1}", "'a b'", "backend.env"),
    "backend_with_odd_buffers": bad("backend=smddp backend.sort_bytes=10000", "sort_bytes=10000", "8192", "backend.sort_bytes"),
    "accelerate_without_its_file": bad("strategy=accelerate strategy.config_path={files}/none.yaml", "none.yaml", "strategy.config_path"),
    "hook_that_the_backend_lacks": bad("strategy.hook=bf16 backend=gloo", "hook=bf16", "gloo", "strategy.hook"),
    "graph_static_and_changing": bad("strategy.static_graph=true strategy.find_unused=true", "static_graph", "find_unused"),
    "powersgd_settings_without_powersgd": bad("strategy.powersgd_rank=2", "powersgd_rank=2", "hook=none", "strategy.powersgd_rank"),
    "momentum_looked_along_without_momentum": bad("optimizer=sgd optimizer.nesterov=true", "nesterov", "optimizer.momentum"),
    "samples_longer_than_the_model": bad("model.config.max_position_embeddings=8", "16 tokens", "8 positions", "data.length"),
    "text_window_longer_than_the_model": bad("hooks=[samples] hooks.samples.window=5000", "window=5000", "2048", "hooks.samples.window"),
    "vocabulary_smaller_than_the_tokenizer": bad("model.config.vocab_size=100", "259", "100", "model.config.vocab_size"),
    "vocabulary_smaller_than_the_tokens": tokens("data.paths=[{files}/big.npy] data.boundary=0 model.config.vocab_size=100", "299", "99", "model.config.vocab_size"),
    "labels_without_use": jsonl(f"{LABELS} data.label_field=label", "3 classes", "data.label_field"),
    "labels_missing": jsonl(f"{LABELS} model.objective=classification model.num_labels=2", "label None", "data"),
    "labels_packed": jsonl("data.files=[{files}/rows.jsonl] data.label_field=label", "packing=windows", "data.packing"),
    "labels_more_than_the_model": jsonl(f"{LABELS} data.label_field=label model.objective=classification model.num_labels=2", "3 classes", "num_labels=2", "model.num_labels"),
    "classes_for_a_language_model": bad("model.num_labels=3", "num_labels=3", "causal", "model.num_labels"),
    "noise_for_a_causal_model": bad("model.noise=0.3", "noise=0.3", "causal", "model.noise"),
    "adapter_settings_without_adapters": bad("model.lora.alpha=5", "alpha=5", "model.lora.rank"),
    "objective_that_the_model_lacks": bad("model.objective=seq2seq", "llama", "seq2seq", "model.objective"),
    "source_length_without_source": jsonl("data.files=[{files}/rows.jsonl] data.source_length=5", "source_length=5", "data.source_field"),
    "source_without_encoder": jsonl(f"{LABELS} data.source_field=text", "encoder", "data.source_field"),
    "split_of_files": jsonl("data.files=[{files}/rows.jsonl] data.validation_split=test", "validation_split=test", "data.validation_files"),
    "revision_of_files": jsonl("data.files=[{files}/rows.jsonl] data.revision=main", "revision=main", "data.revision"),
    "stream_without_end": jsonl("data.files=[{files}/rows.jsonl] data.stream=true", "stream=true", "data.limit"),
    "type_of_files_that_say_theirs": tokens("data.paths=[{files}/fine.npy] data.boundary=0 data.type=int64", "type=int64", "data.type"),
    "mixture_weight_negative": bad("data=mixture data.weights.code=-1", "'code'", "-1", "data.weights", without="data"),
    "mixture_weight_without_source": bad("data=mixture data.weights.cod=1", "'cod'", "no source", "data.weights", without="data"),
    "mixture_source_with_workers": bad("data=mixture data.sources.code.workers=1", "'code'", "data.workers", without="data"),
    "name_beside_folder": bad("run.name=abc", "name=abc", "run.dir"),
    "trainer_without_model_group": bad("model=own", "model=own", "make_model", without="model"),
}  # fmt: skip

SHARDING = {
    "shard_size_does_not_divide": bad("strategy=fsdp_hybrid strategy.shard_size=3", "shard_size=3", "2 ranks", "Choose 1 or 2", "strategy.shard_size", sizes=(2,)),
    "shard_size_of_one_process": bad("strategy=fsdp_hybrid strategy.shard_size=2", "shard_size=2", "1 ranks", "strategy.shard_size", sizes=(1,)),
    "shard_size_negative": bad("strategy=fsdp_hybrid strategy.shard_size=-2", "shard_size=-2", "below 1", "strategy.shard_size", sizes=(1,)),
    "shard_size_where_all_is_cut": bad("strategy=fsdp_full strategy.shard_size=2", "shard_size=2", "sharding=full", "fsdp_hybrid", sizes=(1,)),
    "shard_size_by_two_names": bad("strategy=fsdp_hybrid strategy.shard_size=2 strategy.hybrid_shard_degree=2", "shard_size and hybrid_shard_degree", "strategy.hybrid_shard_degree"),
    "shard_size_by_both_older_names": bad("strategy=mics strategy.sharded_data_parallel_degree=2 strategy.hybrid_shard_degree=2", "sharded_data_parallel_degree and hybrid_shard_degree", "Give one", sizes=(1,)),
    "replicas_do_not_divide": bad("strategy=fsdp_hybrid strategy.replicas=3", "replicas=3", "strategy.replicas", sizes=(1, 2)),
    "replicas_and_shard_size": bad("strategy=fsdp_hybrid strategy.replicas=1 strategy.shard_size=2", "shard_size and replicas", "strategy.replicas", sizes=(1,)),
    "replicas_zero": bad("strategy=fsdp_hybrid strategy.replicas=0", "replicas=0", "below 1", "strategy.replicas", sizes=(1,)),
    "sharding_unknown": bad("strategy=fsdp_full strategy.sharding=fully", "strategy.sharding", "fully", "hybrid", sizes=(1,)),
    "reshard_where_blocks_stay_whole": bad("strategy=fsdp_grad_op strategy.reshard_after_forward=2", "reshard_after_forward=2", "sharding=grad_op", "strategy.reshard_after_forward", sizes=(1,)),
    "reshard_where_nothing_is_cut": bad("strategy=fsdp_replicate strategy.reshard_after_forward=2", "reshard_after_forward=2", "sharding=replicate", sizes=(1,)),
    "reshard_over_all_ranks": bad("strategy=fsdp_full strategy.reshard_after_forward=2", "reshard_after_forward=2", "strategy.reshard_after_forward"),
    "reshard_over_one": bad("strategy=fsdp_full strategy.reshard_after_forward=1", "reshard_after_forward=1", "below 2", sizes=(1,)),
    "wrap_of_no_class": bad("strategy=fsdp_full strategy.wrap=[LlamaDecoderLayr]", "'LlamaDecoderLayr'", "LlamaDecoderLayer", "strategy.wrap"),
    "wrap_by_class_and_size": bad("strategy=fsdp_full strategy.wrap=[Linear] strategy.wrap_parameters=10", "wrap and wrap_parameters", "strategy.wrap", sizes=(1,)),
    "wrap_of_negative_size": bad("strategy=fsdp_full strategy.wrap_parameters=-1", "wrap_parameters=-1", "strategy.wrap_parameters", sizes=(1,)),
    "prefetch_zero": bad("strategy=fsdp_full strategy.prefetch=0", "prefetch=0", "strategy.prefetch", sizes=(1,)),
    "horovod_commit_never": bad("strategy=horovod strategy.commit_every=0", "commit_every=0", "strategy.commit_every", sizes=(1,)),
    "horovod_op_unknown": bad("strategy=horovod strategy.op=mean", "strategy.op", "mean", "average", sizes=(1,)),
    "horovod_compression_unknown": bad("strategy=horovod strategy.compression=bf16", "strategy.compression", "bf16", "fp16", sizes=(1,)),
    "setting_of_another_strategy": bad("strategy=fsdp_full strategy.bucket_mb=1", "strategy.bucket_mb", "no key", sizes=(1,)),
}  # fmt: skip

FILES = {
    "text_missing": bad("data.paths=[nowhere]", "'nowhere'", "data.paths"),
    "text_without_paths": bad("data.paths=['']", "['']", "data.paths"),
    "text_of_no_bytes": bad("data.paths=[{files}/empty.txt]", "no text", "empty.txt", "(data)"),
    "text_of_garbage": bad("data.paths=[{files}/garbage]", "garbage", "not UTF-8 at byte 128", "data.paths"),
    "text_that_can_not_be_read": bad("data.paths=[/proc/self/mem]", "/proc/self/mem", "can't be read", "data.paths"),
    "text_that_no_pattern_matches": bad("data.paths=[{files}] data.pattern=*.zzz", "'*.zzz'", "data.pattern"),
    "jsonl_missing": jsonl("data.files=[no.jsonl]", "'no.jsonl'", "data.files"),
    "jsonl_with_a_broken_line": jsonl("data.files=[{files}/broken.jsonl]", "broken.jsonl", "row 40", "data.files"),
    "jsonl_of_no_bytes": jsonl("data.files=[{files}/empty.txt]", "empty.txt", "no row", "data.files"),
    "jsonl_of_garbage": jsonl("data.files=[{files}/garbage]", "garbage", "data.files"),
    "jsonl_with_numbers_for_text": jsonl("data.files=[{files}/rows.jsonl] data.text_field=label", "row 1", "int", "data.text_field"),
    "jsonl_without_the_field": jsonl("data.files=[{files}/rows.jsonl] data.text_field=txt", "row 1", "'txt'", "text", "data.text_field"),
    "parquet_that_is_none": bad("data=parquet data.files=[{files}/garbage]", "garbage", "arquet", "data.files", without="data"),
    "messages_without_answers": bad("data=messages data.files=[{files}/chat.jsonl]", "row 1", "assistant", "data.files", without="data"),
    "hub_while_offline": bad("data=hub data.path=some/dataset", "'some/dataset'", "data.path", without="data"),
    "tokens_missing": tokens("data.paths=[no.npy] data.boundary=0", "no.npy", "data.paths"),
    "tokens_of_fractions": tokens("data.paths=[{files}/float.npy] data.boundary=0", "float64", "data.paths"),
    "tokens_of_half_a_number": tokens("data.paths=[{files}/odd.bin] data.boundary=0", "odd.bin", "multiple", "data.type"),
    "tokens_below_zero": tokens("data.paths=[{files}/negative.npy] data.boundary=0", "-5", "data.type"),
    "tokens_beyond_the_tokenizer": tokens("data.paths=[{files}/big.npy] data.tokenizer=bytes", "299", "258", "data.tokenizer"),
    "tokens_without_boundary": tokens("data.paths=[{files}/fine.npy]", "between documents", "data.boundary"),
    "tokens_of_no_bytes": tokens("data.paths=[{files}/empty.txt] data.boundary=0", "empty", "data.paths"),
    "tokens_that_are_no_array": tokens("data.paths=[{files}/garbage.npy] data.boundary=0", "garbage.npy", ".npy file of numbers", "data.paths"),
    "tokenizer_missing": bad("data.tokenizer=nowhere", "'nowhere'", "data.tokenizer"),
    "tokenizer_hollow": bad("data.tokenizer={files}/hollow", "hollow", "data.tokenizer"),
    "model_of_nothing": model("", "neither path nor architecture", "model.path"),
    "model_said_twice": model("model.path=a model.architecture=llama", "path=a", "architecture=llama", "model.path"),
    "model_missing": model("model.path=nowhere", "'nowhere'", "model.path"),
    "model_while_offline": model("model.path=org/name", "'org/name'", "model.path"),
    "model_hollow": model("model.path={files}/hollow", "hollow", "model.path"),
    "model_with_broken_configuration": model("model.path={files}/broken_model", "broken_model", "JSON", "model.path"),
    "model_without_weights": model("model.path={files}/no_weights", "no_weights", "model.safetensors", "(model)"),
    "model_with_code_of_its_own": model("model.path={files}/with_code", "with_code", "custom code", "model.path"),
    "model_architecture_mistyped": model("model.architecture=lama", "lama", "Nearest: llama", "model.architecture"),
    "cache_is_a_file": bad("cache={files}/empty.txt", "empty.txt", "(cache)"),
    "cache_not_writable": bad("cache=/proc/x", "/proc/x", "(cache)"),
    "cache_empty": bad("cache=''", "cache is empty", "(cache)"),
    "folder_is_a_file": bad("run.dir={files}/empty.txt", "empty.txt", "run.dir"),
    "folder_not_writable": bad("run.dir=/proc/x", "/proc/x", "run.dir"),
    "folder_name_too_long": bad(f"run.dir={'x' * 300}", "too long", "run.dir"),
    "folder_empty": bad("run.dir=''", "dir=''", "run.dir"),
    "name_is_a_path": bad("run.dir=null run.name=../abc", "'../abc'", "run.name"),
    "checkpoints_in_a_file": bad("checkpoint.folder={files}/empty.txt", "empty.txt", "checkpoint.folder"),
    "checkpoints_not_writable": bad("checkpoint.folder=/proc/x", "/proc/x", "checkpoint.folder"),
    "resume_from_nowhere": bad("resume=nowhere", "nowhere", "(resume)", fresh=True),
    "resume_from_no_checkpoint": bad("resume={files}/hollow", "hollow", "no complete checkpoint", "(resume)", fresh=True),
    "resume_from_a_step_that_is_not_there": bad("resume={run}/checkpoints/step-00000009", "step-00000009", "(resume)", fresh=True),
    "resume_with_another_model": bad("resume={run} model.config.hidden_size=32", "(259, 16)", "(259, 32)", "(model)", fresh=True),
    "resume_never_over_checkpoints": bad("resume=never", "step-00000002", "resume=never", "(resume)"),
    "resume_empty": bad("resume=''", "resume is empty", "(resume)"),
    "logger_without_its_library": bad("logger=[wandb]", "wandb", "shardwright[loggers]", "(logger)"),
    "logger_port_beyond_the_last": bad("logger=[prometheus] logger.prometheus.port=70000", "port=70000", "logger.prometheus.port"),
    "logger_host_is_a_name": bad("logger=[prometheus] logger.prometheus.host=node7", "'node7'", "logger.prometheus.host"),
    "logger_targets_not_writable": bad("logger=[prometheus] logger.prometheus={port:0,targets:/proc/x}", "/proc/x/run.json", "logger.prometheus.targets"),
    "logger_folder_is_a_file": bad("logger=[tensorboard] logger.tensorboard.directory=tb", "run/tb", "logger.tensorboard.directory"),
}  # fmt: skip

LAUNCHES = {
    "rank_in_words": launched("RANK='one'", "torchrun", RANK="one"),
    "rank_negative": launched("RANK='-1'", "torchrun", RANK="-1"),
    "rank_beyond_world_size": launched("RANK=5", "WORLD_SIZE=1", RANK="5"),
    "world_size_zero": launched("WORLD_SIZE=0", "torchrun", WORLD_SIZE="0"),
    "world_size_missing": launched("WORLD_SIZE", "torchrun", unset=("WORLD_SIZE",)),
    "local_rank_in_words": launched("LOCAL_RANK='x'", "torchrun", LOCAL_RANK="x"),
}

CLASSES = {
    "trainer_that_is_no_dataclass": of_class("Bare", "", "Bare", "@dataclass(kw_only=True)", "(trainer)"),
    "trainer_field_without_value": of_class("Needy", "", "trainer.hidden has no value", "trainer.hidden="),
    "trainer_field_of_no_known_type": of_class("Odd", "", "Odd", "activation", "(trainer.activation)"),
    "trainer_and_another_model": of_class("Rows", "model=llama_tiny data=own", "model=llama_tiny", "make_model"),
    "trainer_field_mistyped": of_class("Rows", "trainer.num_sample=3", "trainer.num_sample", "num_samples"),
    "trainer_model_without_storage": of_class("Hollow", "", "Sequential was built without storage", "make_model", "(model, strategy)"),
    "trainer_model_without_storage_to_be_cut": of_class("Hollow", "strategy=fsdp_full", "Sequential was built without storage", "(model, strategy)"),
    "trainer_without_samples": of_class("Rows", "trainer.num_samples=0", "no sample", "(data)"),
}  # fmt: skip

CASES = KEYS | WORDS | VALUES | CONTRADICTIONS | SHARDING | FILES | LAUNCHES | CLASSES
ALONE = [*KEYS, *WORDS, *VALUES][::2]
"""Refused before ranks know of each other: half of them with one process is enough for a test."""
BASE = [word for word in TINY if not word.startswith(("trainer.max_steps", "trainer.eval_every"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user might point at."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").touch()
    (folder / "garbage").write_bytes(bytes(range(256)) * 20)
    rows = [json.dumps({"text": f"row {number} " * 9, "label": number % 3}) for number in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "broken.jsonl").write_text("\n".join([*rows[:40], '{"text": "row', *rows[41:]]))
    (folder / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    np.save(folder / "float.npy", np.zeros(1000))
    np.save(folder / "big.npy", (np.arange(1000) % 300).astype(np.uint16))
    np.save(folder / "fine.npy", (np.arange(1000) % 200).astype(np.uint16))
    np.save(folder / "negative.npy", (np.arange(1000) % 30 - 5).astype(np.int64))
    (folder / "garbage.npy").write_bytes(b"no array at all")
    (folder / "odd.bin").write_bytes(bytes(1001))
    (folder / "hollow").mkdir()
    tiny = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 259}  # fmt: skip
    for name, text in (
        ("broken_model", "{"),
        ("no_weights", json.dumps(tiny)),
        ("with_code", json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    (folder / "with_code" / "mine.py").write_text("raise SystemExit('this code ran')\n")
    return folder


@pytest.fixture(scope="module")
def finished(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that has ended, with its cache beside it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = [*BASE, "trainer.max_steps=2", f"run.dir={folder}", f"cache={folder.parent}/cache"]
    [ended] = workers.run(start, 1, words)
    assert (ended.code, ended.err) == (0, "")
    return folder


def words_of(case: Bad, files: Path, run: Path, finished: Path) -> list[str]:
    base = [word for word in BASE if not word.startswith(tuple(case.without.split()) or "-")]
    if case.trainer in ("Rows", "Hollow"):
        base = [*ROWS]
    given = [word.format(files=files, run=finished) if "{files}" in word or "{run}" in word else word
             for word in case.words.split()]  # fmt: skip
    given = ["" if word == "''" else word for word in given]
    # Two processes have another shell than one: what was written on the command line is the same.
    return [*base, "trainer.max_steps=4", f"run.dir={run}", f"cache={finished.parent}/cache", *given]


def check_refused(starts: list[Start], says: tuple[str, ...]) -> None:
    """One line, from one rank (rank 0, unless it is more than a second later than another), and code 2 everywhere."""
    assert [each.code for each in starts] == [2] * len(starts), starts
    speakers = [each for each in starts if each.err]
    assert len(speakers) == 1, starts
    [first] = speakers
    assert first.err.startswith("ConfigError: "), first.err
    assert first.err.count("\n") == 1, first.err
    for part in says:
        assert part in first.err, first.err
    assert all(each.seconds < MOST_S for each in starts)
    assert all("Traceback" not in each.out and "Error" not in each.out for each in starts)


@pytest.mark.parametrize(("size", "name"), [(size, name) for name, case in CASES.items() for size in case.sizes])
def test_start_wrong_is_refused_in_one_line_and_nothing_is_lost(
    workers: Workers, files: Path, finished: Path, tmp_path: Path, name: str, size: int
) -> None:
    case, run = CASES[name], tmp_path / "run"
    if not case.fresh:
        shutil.copytree(finished, run)
        (run / "tb").touch()
    before = digests(tmp_path)
    words = words_of(case, files, run, finished)
    starts = workers.run(start, size, words, case.unset, case.trainer, environment=case.variables, timeout=60)
    check_refused(starts, case.says)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("strategy", options("strategy"))
def test_every_strategy_trains_alone(workers: Workers, finished: Path, tmp_path: Path, strategy: str) -> None:
    words = [*BASE, "trainer.max_steps=1", f"run.dir={tmp_path}/run", f"cache={finished.parent}/cache"]
    [ended] = workers.run(start, 1, [*words, f"strategy={strategy}"], timeout=60)
    reasons = ("isn't installed", "is not installed", "these ranks weren't started by it", "lies in memory")
    if ended.code == 2 and any(reason in ended.err for reason in reasons):
        pytest.skip(ended.err)
    assert (ended.code, ended.err) == (0, "")


def test_cases_are_enough() -> None:
    assert len(CASES) >= 60


# The same as real processes.


def process(*words: str, folder: Path) -> tuple[int, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    found = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=folder, timeout=60, check=False,
        env={**kept, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return found.returncode, found.stderr


TRAIN = str(ROOT / "scripts" / "train.py")


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("key_added_with_a_plus", ()),
        ("text_missing", ()),
        ("evaluation_samples_without_validation", (str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", "2")),
    ],
)
def test_process_wrong_is_refused_in_one_line(files: Path, tmp_path: Path, name: str, before: tuple[str, ...]) -> None:
    words = words_of(CASES[name], files, tmp_path / "run", tmp_path / "finished")
    code, err = process(*(before or (TRAIN,)), *words, folder=tmp_path)
    assert code == 2
    [line] = err.splitlines()
    assert line.startswith("ConfigError: ")
    for part in CASES[name].says:
        assert part in line


def test_process_under_torchrun_says_the_line_once_and_torchrun_gives_its_own_code(files: Path, tmp_path: Path) -> None:
    words = words_of(CASES["text_missing"], files, tmp_path / "run", tmp_path / "finished")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    code, err = process(*torchrun, TRAIN, *words, folder=tmp_path)
    assert code == 1
    assert err.count("ConfigError: TextData: there is no file or folder 'nowhere'") == 1
    assert "exitcode  : 2" in err
