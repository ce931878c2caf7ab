"""The one adapter from our configuration to Megatron's `TransformerConfig`.

Megatron's defaults are for GPT-3 (dropout 0.1, biases, GELU, LayerNorm), so every field that matters
is given explicitly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from megatron_ext.config.derived import head_size
from megatron_ext.config.tree import Config
from megatron_ext.errors import ConfigError
from megatron_ext.parallel import device

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def uses_transformer_engine(config: Config) -> bool:
    """Decide between Transformer Engine's modules and the local ones.

    Raises:
        ConfigError: the configuration asks for something that this machine lacks.
    """
    wanted = config.model.transformer_impl
    there = device.has_transformer_engine()
    problems = []
    if wanted == "transformer_engine" and not there:
        problems.append(
            "model.transformer_impl (transformer_engine) needs a CUDA device and the transformer-engine package; "
            "use auto or local here (tools/doctor.py says what is missing)."
        )
    if config.precision.dtype == "fp8":
        if not there:
            problems.append(
                "precision.dtype (fp8) needs Transformer Engine and a CUDA device; use bf16 here "
                "(tools/doctor.py says what is missing)."
            )
        elif not device.is_hopper_or_later():
            problems.append(f"precision.dtype (fp8) needs a Hopper GPU or later, not {device.name()}; use bf16.")
    if config.parallel.context_parallel_size > 1 and not there:
        problems.append(
            "parallel.context_parallel_size > 1 needs Transformer Engine's attention; use 1 here, or shorter sequences."
        )
    if problems:
        raise ConfigError(problems)
    # Its attention is 16-bit only, so fp32 means the local modules unless they were asked for by name.
    return there and (wanted == "transformer_engine" or (wanted == "auto" and config.precision.dtype != "fp32"))


def build_transformer_config(config: Config) -> TransformerConfig:
    """Build Megatron's configuration object. Weights stay uninitialised: model/init.py fills them."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    model, parallel, precision = config.model, config.parallel, config.precision
    engine = uses_transformer_engine(config)
    cuda = device.is_cuda()
    dtype = torch.float32 if precision.dtype == "fp32" else torch.bfloat16
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    fp8 = precision.dtype == "fp8"
    recompute = parallel.recompute_granularity
    deterministic = config.reliability.deterministic
    return TransformerConfig(
        # shape
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=head_size(model),
        # Llama
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        embedding_init_method=_leave_as_it_is,
        use_cpu_initialization=not cuda,
        # precision
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp8=precision.fp8_format if fp8 else None,
        fp8_recipe=Fp8Recipe[precision.fp8_recipe] if fp8 else Fp8Recipe.delayed,
        fp8_param=precision.fp8_param_gather,
        first_last_layers_bf16=precision.first_last_layers_bf16,
        attention_softmax_in_fp32=True,
        # parallelism
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Interleaving over batched point-to-point gives silently wrong gradients (specs 2.4 h).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # An activation is freed once its send is queued: sound on CUDA's stream, but gloo still reads from it.
        deallocate_pipeline_outputs=cuda,
        # The loss of an iteration is the mean over its tokens, not the mean of its micro batches' means.
        calculate_per_token_loss=True,
        # recomputation
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=parallel.recompute_num_layers if recompute == "full" else None,
        # The backward pass of the embedding, and Transformer Engine's choice of attention.
        deterministic_mode=deterministic,
        # kernels: all need CUDA, and some need Transformer Engine or apex
        attention_backend=AttnBackend.auto,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        apply_rope_fusion=engine,
        # Megatron's fused cross-entropy returns bf16 gradients. Transformer Engine's (2.17.1) also keeps the softmax in
        # the bf16 logits' buffer, where the gradient of a token at p = 0.999 rounds to 0.
        # Nor does it repeat itself bit for bit (megatron/training/arguments.py of core_v0.16.1 asserts it is off).
        cross_entropy_loss_fusion=cuda and dtype is torch.bfloat16 and not deterministic,
        cross_entropy_fusion_impl="native",
        gradient_accumulation_fusion=device.has_apex(),
    )


def _leave_as_it_is(weight: torch.Tensor) -> torch.Tensor:
    # Megatron must believe that it initialises: it sets the tensor-parallel attributes on the way.
    return weight
