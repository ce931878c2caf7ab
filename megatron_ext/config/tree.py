"""The configuration tree: every setting of a run, its type, its default and its meaning.

Names are Megatron-Core's. Order of precedence: default here < TOML file < command line; nothing else.
The docstring under each field is its `--help` text and its entry in docs/CONFIG.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape, initialisation and implementation of the model (Llama family)."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the SwiGLU MLP (gate and up each)."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads: equal to num_attention_heads is MHA, 1 is MQA, between is GQA."""
    kv_channels: int | None = None
    """Width of one head; default hidden_size / num_attention_heads."""
    vocab_size: int
    """True vocabulary size, special tokens included; must cover the tokenizer's ids."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this, whatever the tensor-parallel size; export strips them."""
    max_position_embeddings: int
    """Longest sequence that the model is declared for; train.seq_length may not exceed it."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the input embedding."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""
    rotary_base: float = 10000.0
    """Base (theta) of the rotary position embedding."""
    rotary_scaling_factor: float | None = None
    """Llama-3 frequency scaling by this factor (low 1, high 4, original length 8192); default none."""
    init_method: Literal["pints", "megatron"] = "pints"
    """pints: N(0, sqrt(2/(5h))), residual outputs N(0, 1/(sqrt(h) L)). megatron: N(0, std), outputs std/sqrt(2L)."""
    init_method_std: float | None = None
    """Standard deviation of every matrix but the residual outputs; default as init_method says (megatron: 0.02)."""
    output_init_method_std: float | None = None
    """Standard deviation of the matrices that write to the residual stream; default as init_method says."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """local: torch modules and SDPA. auto: Transformer Engine where it imports and CUDA is there, else local."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats. Master weights, gradients and Adam's moments are always fp32."""

    dtype: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Format of weights and activations; fp8 is bf16 with FP8 matrix products (Transformer Engine, Hopper or later)."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "tensorwise"
    """Transformer Engine's scaling recipe; tensorwise (current scaling) is the robust one on Hopper."""
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: E4M3 forward and E5M2 backward; e4m3: E4M3 in both."""
    fp8_param_gather: bool = False
    """Keep weights in FP8 and gather them in FP8."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layer in bf16 under fp8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; data parallelism takes the ranks that remain."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (1F1B schedule)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved 1F1B); default one."""
    context_parallel_size: int = 1
    """Ranks that share each sequence; needs Transformer Engine."""
    sequence_parallel: bool = False
    """Shard the norms' activations over the tensor-parallel ranks too."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradient buckets while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the distributed optimizer."""
    ddp_bucket_size: int | None = None
    """Elements per gradient bucket when overlap is on; default 40,000,000. Enters dp_reshardable checkpoints."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none; selective (core attention); full (whole layers)."""
    recompute_num_layers: int = 1
    """Layers per recomputed block when recompute_granularity is full."""
    distributed_timeout_minutes: float = 10.0
    """A rank that stands still for longer, in a collective or out of one, ends the run, and the rank that the others
    wait for is named. In a start, a first iteration and a save: three times this.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read, and how samples are formed."""

    tokenizer: str
    """Folder with the tokenizer.json that the data was made with."""
    train_data: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs (paths without the ending)."""
    train_weights: tuple[float, ...] | None = None
    """How much of each prefix is read, in train_weights_unit; default: one pass over all, in proportion to size."""
    train_weights_unit: Literal["proportion", "tokens", "epochs"] = "proportion"
    """What train_weights count; tokens and epochs are those of the whole run, and must add up to its length."""
    blend_file: str | None = None
    """TOML file with a [[source]] for each prefix and its weight, tokens or epochs; sets the three fields above."""
    valid_data: tuple[str, ...] | None = None
    """Prefixes for validation; default: the validation share of train_data, as split says."""
    split: str = "99,1"
    """Documents for training and for validation, in proportion, dealt evenly over each file. Not with valid_data."""
    sample_index: Literal["gpt_dataset", "lazy"] = "gpt_dataset"
    """gpt_dataset: documents shuffled, index arrays in a cache. lazy: windows of the file, shuffled; no arrays."""
    path_to_cache: str | None = None
    """Folder for index caches; default: cache/ beside each .bin."""
    eod_mask_loss: bool = False
    """Leave out of the loss the positions whose input is the end-of-document token."""
    document_mask: Literal["none", "reset"] = "none"
    """reset: attention and positions start anew after each end-of-document token. none: a sample is one piece."""
    max_epochs: float | None = None
    """Refuse a run that would pass over any source more often than this; default no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Batches, length of the run, evaluation."""

    seq_length: int
    """Tokens per sample."""
    micro_batch_size: int
    """Samples per forward pass on one data-parallel rank."""
    global_batch_size: int
    """Samples per iteration over all ranks."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """(start, increment, samples): grow the batch from start by increment to global_batch_size over these samples."""
    train_iters: int
    """Iterations of the whole run."""
    exit_iters: int | None = None
    """Save and stop after this iteration, with the schedule still that of train_iters (ProX's early stops)."""
    exit_duration_minutes: float | None = None
    """Save and stop once this much wall-clock time has passed."""
    eval_interval: int | None = 1000
    """Iterations between validations; none: never."""
    eval_iters: int = 100
    """Global batches per validation."""
    seed: int = 1234
    """Seed of initialisation and sample order."""
    manual_gc_interval: int | None = 100
    """Collect Python garbage every so many iterations, on all ranks at once; none: leave it to Python."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, and the learning-rate schedule."""

    lr: float
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up. wsd: constant, then a decay over the last lr_wsd_decay_iters."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from zero, counted at the full global_batch_size."""
    lr_decay_iters: int | None = None
    """Iteration at which min_lr is reached; default train_iters. May exceed train_iters."""
    lr_wsd_decay_iters: int | None = None
    """Length of wsd's final decay; required for wsd."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """Shape of wsd's final decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    weight_decay_scope: Literal["matrices", "all"] = "matrices"
    """matrices: not on norms; all: on every parameter (1.5-Pints trained so)."""
    adam_beta1: float = 0.9
    """Adam's first-moment decay."""
    adam_beta2: float = 0.95
    """Adam's second-moment decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global gradient-norm limit; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What is saved, how, and what a run starts from."""

    save_interval: int | None = 1000
    """Iterations between checkpoints; none: only when the run stops."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy of the state that stays in host memory."""
    optimizer_format: Literal["dp_reshardable", "fully_reshardable"] = "dp_reshardable"
    """dp_reshardable: light, resumes with another number of data-parallel ranks. fully_reshardable: any layout."""
    keep_last: int | None = None
    """Keep this many newest checkpoints; default all."""
    keep_every: int | None = None
    """Besides, keep every checkpoint whose iteration is a multiple of this."""
    resume: bool = True
    """Continue from the newest whole checkpoint of the run directory, if there is one."""
    init_from: str | None = None
    """Start from these weights (a run, a checkpoint, or a Hugging Face Llama/Mistral folder); not the optimizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityConfig:
    """How a run looks for trouble, and what it does about it."""

    preflight: bool = True
    """Before the first iteration, measure links and devices, and check clocks, file system, disk and data."""
    deterministic: bool = False
    """Repeat a run bit for bit on the same layout, software and kind of machine: slower on a GPU; a CPU always does."""
    bad_iteration_policy: Literal["stop", "skip", "rewind"] = "stop"
    """At a spike, or a loss or gradient norm that is not finite, make no update, and: stop; skip: go on with the next
    iteration; rewind: go back to the last checkpoint, and pass the bad iteration over when training comes to it again.
    """
    max_bad_iterations: int = 3
    """Bad iterations that a run may have, restarts included; one more stops it."""
    spike_deviations: float | None = None
    """A loss more than this many standard deviations above the mean of the last ones is a spike; default: none is."""
    spike_window_iters: int = 100
    """Good iterations whose losses a spike is measured against; before there are so many, no loss is a spike."""
    rewind_skip_iters: int = 0
    """Iterations before the bad one that rewind passes over too, as far as the checkpoint goes back."""
    replica_check_interval: int | None = 1000
    """Iterations between comparisons of the weights of data-parallel replicas, which stop the run where they differ;
    none: never.
    """
    straggler_interval: int | None = 100
    """Iterations between comparisons of the ranks' own times; none: never."""
    straggler_ratio: float = 1.3
    """A rank is reported when its own time is this many times the median rank's, in three comparisons in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What a run reports, and where."""

    interval: int = 10
    """Iterations between log lines."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    samples: bool = False
    """Write down which samples each iteration was trained on, in samples/ of the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project; default: not used. Works offline (WANDB_MODE=offline)."""
    progress: Literal["auto", "on", "off"] = "auto"
    """Live progress display; auto: on a terminal only."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device for MFU; default: known devices only, none printed for others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One training run."""

    name: str
    """Name of the run."""
    run_dir: str | None = None
    """Run directory; default runs/NAME."""
    model: ModelConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    log: LogConfig = field(default_factory=LogConfig)
