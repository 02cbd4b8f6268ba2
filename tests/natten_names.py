# SPDX-License-Identifier: MIT
"""The names of every level of natten with their signatures, written down by hand from the releases."""

QKV = "query, key, value"
WINDOW, WINDOW_3D = "kernel_size, dilation", "kernel_size_d, kernel_size, dilation_d, dilation"
DROPS = "qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0"
TILING = (
    "backend=None, {0}, {1}, backward_{0}, backward_{1}, backward_kv_splits=None, backward_use_pt_reduction=False, "
    "run_persistent_kernel=True, kernel_schedule=None, torch_compile=False, return_lse=False"
)
SHAPES, SIZES = (TILING.format(f"q_tile_{what}=None", f"kv_tile_{what}=None") for what in ("shape", "size"))
VARLEN = "seqlens_Q=None, seqlens_KV=None, cumulative_seqlen_Q=None, cumulative_seqlen_KV=None, max_seqlen_Q=None, max_seqlen_KV=None"
FUSED_017 = (
    f"{QKV}, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None, additional_keys=None, "
    "additional_values=None, xformers_kwargs=None"
)
FUSED_021 = (
    f"{QKV}, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, additional_keys=None, "
    f"additional_values=None, attention_kwargs=None, {SHAPES}"
)
TUNER = (
    "forward_pass=None, backward_pass=None, thorough_mode_forward=None, thorough_mode_backward=None, "
    "warmup_steps_forward=None, warmup_steps_backward=None, steps_forward=None, steps_backward=None"
)
CLASSES = "NeighborhoodAttention1D NeighborhoodAttention2D"
SWITCHES = "enable_tf32 disable_tf32 enable_gemm_na disable_gemm_na enable_tiled_na disable_tiled_na"
HAS = "has_half has_bfloat has_gemm has_tf32_gemm has_fp32_gemm has_fp64_gemm"
SHARED_CONTEXT = {
    "mode=True": "use_deterministic_algorithms use_kv_parallelism_in_fused_na",
    "pref='default'": "set_memory_usage_preference",
    "": "are_deterministic_algorithms_enabled is_kv_parallelism_in_fused_na_enabled get_memory_usage_preference "
    "is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted",
}
CONTEXT_017 = {
    "mode=True": SHARED_CONTEXT["mode=True"] + " use_tf32_in_gemm_na use_tiled_na use_gemm_na",
    "pref='default'": SHARED_CONTEXT["pref='default'"],
    "": SHARED_CONTEXT[""] + f" is_fused_na_enabled is_fna_enabled use_flex_attention force_flex_attention has_cuda "
    f"disable_autotuner is_autotuner_enabled is_autotuner_enabled_for_forward is_autotuner_enabled_for_backward "
    f"is_autotuner_thorough_for_forward is_autotuner_thorough_for_backward is_tf32_in_gemm_na_enabled "
    f"is_tiled_na_enabled is_gemm_na_enabled {SWITCHES}",
    "mode=True, kv_parallel=True, use_flex_attention=False, force_flex_attention=False": "use_fused_na use_fna",
    TUNER: "use_autotuner",
    "device_index=None": f"{HAS} has_fna has_fused_na",
}
CONTEXT_020 = {
    "mode=True": SHARED_CONTEXT["mode=True"] + " allow_flex_compile_backprop",
    "mode=True, backprop=False": "allow_flex_compile",
    "pref='default'": SHARED_CONTEXT["pref='default'"],
    "": SHARED_CONTEXT[""] + " is_flex_compile_allowed is_flex_compile_backprop_allowed disable_flex_compile "
    "disable_flex_compile_backprop",
}
FORWARD_KERNELS = "cutlass cutlass_hopper cutlass_blackwell flex"


def configurations(backward_kernels):
    kernels = [("get_configs", name) for name in FORWARD_KERNELS.split()]
    kernels += [("get_bwd_configs", name) for name in backward_kernels.split()]
    return " ".join(f"{prefix}_for_{kernel}_{kind}" for prefix, kernel in kernels for kind in ("fmha", "fna"))


CLASS_0145 = {f"dim, num_heads, kernel_size, dilation=1, bias=True, {DROPS}": CLASSES}
CLASS_3D_015 = {
    f"dim, num_heads, kernel_size, kernel_size_d=None, dilation=1, dilation_d=None, bias=True, {DROPS}": (
        "NeighborhoodAttention3D"
    )
}
CLASS_014 = f"dim, kernel_size, num_heads, {DROPS}, dilation=None, bias=True"
CLASS_017 = (
    f"dim, num_heads, kernel_size, dilation=1, is_causal=False, rel_pos_bias=False, {DROPS}, use_experimental_ops=False"
)
CLASS_020 = "embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False, qkv_bias=True, qk_scale=None, proj_drop=0.0"
ALL_CLASSES = f"{CLASSES} NeighborhoodAttention3D"
FLOPS = {"model, input, disable_warnings=False": "get_flops", "flop_ctr": "add_natten_handle"}
COUNTED = "kernel_size, dilation, is_causal, is_heads_last, return_macs=False"
OLD_CONTEXT = {"": f"has_cuda {SWITCHES}", "device_index=None": HAS}
CHECKS = {
    "na_dim, kernel_size": "check_kernel_size_arg",
    "na_dim, dilation": "check_dilation_arg",
    "na_dim, is_causal": "check_causal_arg",
}
CHECKS_017 = {
    **CHECKS,
    "na_dim, kernel_size, dilation, is_causal": "check_all_args",
    "kernel_size": "get_num_na_weights",
}
CHECKS_020 = {
    **CHECKS,
    "na_dim, stride": "check_stride_arg",
    "na_dim, kernel_size, stride, dilation, is_causal": "check_all_args",
    "input_tensor, kernel_size, stride, dilation, is_causal": "check_args_against_input",
}
KEYS, VALUES = "additional_keys=None", "additional_values=None"
FUSED_NAMES = "na1d na2d na3d"


def unfused(window, ranks):
    return {
        f"query, key, {window}, {KEYS}": " ".join(f"na{n}d_qk natten{n}dqk" for n in ranks),
        f"query, key, bias, {window}, {KEYS}": " ".join(f"na{n}d_qk_with_bias" for n in ranks),
        f"query, key, rpb, {window}": " ".join(f"natten{n}dqkrpb" for n in ranks),
        f"attn, value, {window}, {VALUES}": " ".join(f"na{n}d_av natten{n}dav" for n in ranks),
    }


def old_unfused(window, ranks):
    return {
        f"query, key, {window}": " ".join(f"natten{n}dqk" for n in ranks),
        f"query, key, bias, {window}, {KEYS}": " ".join(f"na{n}d_qk_with_bias" for n in ranks),
        f"query, key, rpb, {window}": " ".join(f"natten{n}dqkrpb" for n in ranks),
        f"attn, value, {window}": " ".join(f"natten{n}dav" for n in ranks),
    }


def newest(fused, attention, merge, backward_kernels):
    return {
        "natten": {CLASS_020: ALL_CLASSES, QKV: configurations(backward_kernels), fused: FUSED_NAMES, attention: "attention",
                   merge: "merge_attentions", **CONTEXT_020, None: "HAS_LIBNATTEN"},
        "natten.functional": {fused: f"{FUSED_NAMES} neighborhood_attention_generic", attention: "attention",
                              merge: "merge_attentions"},
        "natten.modules": {CLASS_020: ALL_CLASSES},
        "natten.context": {**CONTEXT_020, None: "NattenContext MemoryUsagePreference"},
        "natten.utils": {}, "natten.utils.checks": CHECKS_020, "natten.utils.log": LOG, "natten.types": {None: f"{TYPES} KernelSchedule"},
    }  # fmt: skip


LOG = {"name": "get_logger"}
OLD_FLOPS = {**FLOPS, "inputs, outputs": "qk_rpb_flop av_flop qk_1d_rpb_flop av_1d_flop"}
NEWER_FLOPS = {**FLOPS, "inputs, outputs": " ".join(f"qk_{n}d_rpb_flop av_{n}d_flop" for n in "123")}
TENSORS = {
    "input_tensor, additional_keys": "check_additional_keys",
    "attn_tensor, additional_values, value, expected_attn_weights": "check_additional_values",
    "input_tensor, attention_dim": "make_attn_tensor_from_input",
}


def applied(qk, av, ranks):
    """Classes that stood for autograd functions; their `apply` is looked at below."""
    return {None: " ".join(f"{name}".format(n=n) for n in ranks for name in (qk, av))}


OLD_APPLIED = applied("NATTEN{n}DQKRPBFunction", "NATTEN{n}DAVFunction", "12")
APPLIED = applied("NeighborhoodAttention{n}DQKAutogradFunction", "NeighborhoodAttention{n}DAVAutogradFunction", "123")

TYPES = "NoneType " + " ".join(
    f"{stem}{rank}Type{suffix}"
    for stem in ("Dimension", "CausalArg") for rank in ("", "1D", "2D", "3D") for suffix in ("", "OrDed")
)  # fmt: skip

# level -> module -> {signature: names}; names under None are no functions
EXPECTED = {
    "0.14": {
        "natten": {CLASS_014: f"{CLASSES} NeighborhoodAttention"},
        "natten.natten1d": {CLASS_014: "NeighborhoodAttention1D", "query, key, rpb, dilation": "natten1dqkrpb",
                            "attn, value, dilation": "natten1dav"},
        "natten.natten2d": {CLASS_014: "NeighborhoodAttention2D NeighborhoodAttention",
                            "query, key, rpb, dilation": "natten2dqkrpb", "attn, value, dilation": "natten2dav"},
        "natten.functional": {
            "query, key, rpb, dilation": "natten1dqkrpb natten2dqkrpb",
            "attn, value, dilation": "natten1dav natten2dav", **OLD_APPLIED,
        },
        "natten.flops": OLD_FLOPS,
    },
    "0.14.5": {
        "natten": CLASS_0145,
        **{f"natten.natten{n}d": {**{key: f"NeighborhoodAttention{n}D" for key in CLASS_0145},
                                  f"query, key, rpb, {WINDOW}": f"natten{n}dqkrpb",
                                  f"attn, value, {WINDOW}": f"natten{n}dav"} for n in "12"},
        "natten.functional": {
            f"query, key, {WINDOW}": "natten1dqk natten2dqk",
            f"query, key, rpb, {WINDOW}": "natten1dqkrpb natten2dqkrpb",
            f"attn, value, {WINDOW}": "natten1dav natten2dav", **OLD_APPLIED,
        },
        "natten.flops": OLD_FLOPS,
    },
    "0.15": {
        "natten": {**CLASS_0145, **CLASS_3D_015, **OLD_CONTEXT},
        **{f"natten.natten{n}d": {**classes, f"query, key, bias, {window}, {KEYS}": f"na{n}d_qk_with_bias",
                                  f"attn, value, {window}, {VALUES}": f"na{n}d_av natten{n}dav"}
           for n, window, classes in (
               (1, WINDOW, {key: "NeighborhoodAttention1D" for key in CLASS_0145}),
               (2, WINDOW, {key: "NeighborhoodAttention2D" for key in CLASS_0145}), (3, WINDOW_3D, CLASS_3D_015))},
        "natten.functional": {**unfused(WINDOW, "12"), **unfused(WINDOW_3D, "3"), "": OLD_CONTEXT[""],
                              "device_index=None": f"{HAS} get_device_cc", **APPLIED},
        "natten.flops": NEWER_FLOPS, "natten.utils": {**TENSORS, None: "NoneType"}, "natten.utils.tensor": TENSORS,
        "natten.utils.typing": {None: "NoneType"},
    },
    "0.17": {
        "natten": {CLASS_017: ALL_CLASSES, **CONTEXT_017},
        **{f"natten.na{n}d": {CLASS_017: f"NeighborhoodAttention{n}D"} for n in "123"},
        **{f"natten.natten{n}d": {CLASS_017: f"NeighborhoodAttention{n}D",
                                  f"query, key, bias, {window}, {KEYS}": f"na{n}d_qk_with_bias"}
           for n, window in ((1, WINDOW), (2, WINDOW), (3, WINDOW_3D))},
        "natten.functional": {
            **old_unfused(WINDOW, "12"), **old_unfused(WINDOW_3D, "3"), FUSED_017: FUSED_NAMES,
            f"query, key, kernel_size, dilation=1, {KEYS}, is_causal=False, rpb=None": "na1d_qk na2d_qk na3d_qk",
            f"attn, value, kernel_size, dilation=1, {VALUES}, is_causal=False": "na1d_av na2d_av na3d_av",
            "device_index=None": "get_device_cc", **APPLIED,
        },
        "natten.experimental": {FUSED_017: FUSED_NAMES},
        "natten.flex": {
            f"{QKV}, kernel_size, dilation=1, is_causal=False, {KEYS}, {VALUES}, xformers_kwargs=None": (
                "flex_na1d flex_na2d flex_na3d"
            ),
            "input_shape": "can_run_flex_attention",
        },
        "natten.context": {
            **CONTEXT_017, "": CONTEXT_017[""] + " should_use_flex_attention should_force_flex_attention",
            None: "NattenContext AutotunerContext MemoryUsagePreference",
        },
        "natten.utils": {**CHECKS_017, **TENSORS, "device_index=None": "get_device_cc"}, "natten.utils.tensor": TENSORS,
        "natten.utils.log": LOG,
        "natten.utils.checks": CHECKS_017,
        "natten.flops": {
            **NEWER_FLOPS, f"q_shape, k_shape, v_shape, {COUNTED}": "fna_flop_count",
            f"q_shape, k_shape, {COUNTED}": "na_qk_flop_count", f"a_shape, v_shape, {COUNTED}": "na_av_flop_count",
        },
        "natten.types": {None: TYPES},
    },
    "0.20": newest(
        f"{FUSED_021}, *, try_fuse_additional_kv=False", f"{QKV}, scale=None, {SIZES}, *, is_causal=False, {VARLEN}",
        "outputs, lse_tensors, torch_compile=True, *, use_autograd_fix=True", "cutlass",
    ),
    "0.21": newest(
        FUSED_021, f"{QKV}, is_causal=False, scale=None, {VARLEN}, {SIZES}",
        "outputs, lse_tensors, torch_compile=True, use_autograd_fix=True", "cutlass cutlass_hopper cutlass_blackwell",
    ) | {"natten.utils.varlen": {f"{QKV}, seqlens_Q=None, seqlens_KV=None": "generate_varlen_parameters"}},
}  # fmt: skip
