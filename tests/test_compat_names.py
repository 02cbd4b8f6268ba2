# SPDX-License-Identifier: MIT
"""Every name of every level of natten: it is there, with the signature of the release; and where libraries find it."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from natten_ops import compat
from natten_ops.compat import levels

ROOT = Path(__file__).parents[1]

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
CONFIGURATIONS = " ".join(
    f"{prefix}_for_{kernel}_{kind}"
    for prefix, kernels in (
        ("get_configs", ("cutlass", "cutlass_hopper", "cutlass_blackwell", "flex")),
        ("get_bwd_configs", ("cutlass", "cutlass_hopper", "cutlass_blackwell")),
    )
    for kernel in kernels
    for kind in ("fmha", "fna")
)
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


def newest(fused, attention, merge):
    return {
        "natten": {CLASS_020: ALL_CLASSES, QKV: CONFIGURATIONS, fused: FUSED_NAMES, attention: "attention",
                   merge: "merge_attentions", **CONTEXT_020, None: "HAS_LIBNATTEN"},
        "natten.functional": {fused: f"{FUSED_NAMES} neighborhood_attention_generic", attention: "attention",
                              merge: "merge_attentions"},
        "natten.modules": {CLASS_020: ALL_CLASSES},
        "natten.context": {**CONTEXT_020, None: "NattenContext MemoryUsagePreference"},
        "natten.utils": {}, "natten.utils.checks": CHECKS_020, "natten.types": {None: f"{TYPES} KernelSchedule"},
    }  # fmt: skip


TYPES = "NoneType " + " ".join(
    f"{stem}{rank}Type{suffix}"
    for stem in ("Dimension", "CausalArg") for rank in ("", "1D", "2D", "3D") for suffix in ("", "OrDed")
)  # fmt: skip

# level -> module -> {signature: names}; names under None are no functions
EXPECTED = {
    "0.14": {
        "natten": {CLASS_014: f"{CLASSES} NeighborhoodAttention"},
        "natten.natten1d": {CLASS_014: "NeighborhoodAttention1D"},
        "natten.natten2d": {CLASS_014: "NeighborhoodAttention2D NeighborhoodAttention"},
        "natten.functional": {
            "query, key, rpb, dilation": "natten1dqkrpb natten2dqkrpb",
            "attn, value, dilation": "natten1dav natten2dav",
        },
        "natten.flops": FLOPS,
    },
    "0.14.5": {
        "natten": CLASS_0145,
        "natten.natten1d": {key: "NeighborhoodAttention1D" for key in CLASS_0145},
        "natten.natten2d": {key: "NeighborhoodAttention2D" for key in CLASS_0145},
        "natten.functional": {
            f"query, key, {WINDOW}": "natten1dqk natten2dqk",
            f"query, key, rpb, {WINDOW}": "natten1dqkrpb natten2dqkrpb",
            f"attn, value, {WINDOW}": "natten1dav natten2dav",
        },
        "natten.flops": FLOPS,
    },
    "0.15": {
        "natten": {**CLASS_0145, **CLASS_3D_015, **OLD_CONTEXT},
        "natten.natten1d": {key: "NeighborhoodAttention1D" for key in CLASS_0145},
        "natten.natten2d": {key: "NeighborhoodAttention2D" for key in CLASS_0145},
        "natten.natten3d": CLASS_3D_015,
        "natten.functional": {**unfused(WINDOW, "12"), **unfused(WINDOW_3D, "3"), "": OLD_CONTEXT[""],
                              "device_index=None": f"{HAS} get_device_cc"},
        "natten.flops": FLOPS,
    },
    "0.17": {
        "natten": {CLASS_017: ALL_CLASSES, **CONTEXT_017},
        **{f"natten.{old}{n}d": {CLASS_017: f"NeighborhoodAttention{n}D"} for old in ("natten", "na") for n in "123"},
        "natten.functional": {
            **old_unfused(WINDOW, "12"), **old_unfused(WINDOW_3D, "3"), FUSED_017: FUSED_NAMES,
            f"query, key, kernel_size, dilation=1, {KEYS}, is_causal=False, rpb=None": "na1d_qk na2d_qk na3d_qk",
            f"attn, value, kernel_size, dilation=1, {VALUES}, is_causal=False": "na1d_av na2d_av na3d_av",
            "device_index=None": "get_device_cc",
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
        "natten.utils": {**CHECKS_017, "device_index=None": "get_device_cc"},
        "natten.utils.checks": CHECKS_017,
        "natten.flops": {
            **FLOPS, f"q_shape, k_shape, v_shape, {COUNTED}": "fna_flop_count",
            f"q_shape, k_shape, {COUNTED}": "na_qk_flop_count", f"a_shape, v_shape, {COUNTED}": "na_av_flop_count",
        },
        "natten.types": {None: TYPES},
    },
    "0.20": newest(
        f"{FUSED_021}, *, try_fuse_additional_kv=False", f"{QKV}, scale=None, {SIZES}, *, is_causal=False, {VARLEN}",
        "outputs, lse_tensors, torch_compile=True, *, use_autograd_fix=True",
    ),
    "0.21": newest(
        FUSED_021, f"{QKV}, is_causal=False, scale=None, {VARLEN}, {SIZES}",
        "outputs, lse_tensors, torch_compile=True, use_autograd_fix=True",
    ) | {"natten.utils.varlen": {f"{QKV}, seqlens_Q=None, seqlens_KV=None": "generate_varlen_parameters"}},
}  # fmt: skip


def modules_of(root):
    """Dotted name -> module, by walking the attributes."""
    found, waiting = {}, [root]
    while waiting:
        module = waiting.pop()
        found[module.__name__] = module
        waiting += [m for m in vars(module).values() if inspect.ismodule(m)]
    return found


@pytest.mark.parametrize("level", EXPECTED)
def test_a_level_has_its_names_with_their_signatures(level):
    modules = modules_of(compat.natten(version=level))
    assert set(modules) == set(EXPECTED[level])
    for path, signatures in EXPECTED[level].items():
        expected = {name: text for text, names in signatures.items() for name in names.split()}
        assert set(modules[path].__all__) == set(expected)
        for name, text in expected.items():
            item = getattr(modules[path], name)
            if text is not None:
                assert str(inspect.signature(item)) == f"({text})", f"{path}.{name}"
                assert (item.__name__, inspect.isclass(item)) == (name, name.startswith("Neighborhood"))
                assert item.__doc__, f"{path}.{name}"


def test_every_level_is_expected_and_shared_names_are_one_object():
    assert tuple(EXPECTED) == compat.LEVELS
    module = compat.natten(version="0.17")
    assert (
        module.NeighborhoodAttention2D is module.na2d.NeighborhoodAttention2D is module.natten2d.NeighborhoodAttention2D
    )
    assert module.use_fused_na is module.context.use_fused_na
    assert compat.natten(version="0.17") is module


@pytest.mark.parametrize(
    "version, level, release",
    [
        ("0.14", "0.14", "0.14.4"), ("0.14.2.post4", "0.14", "0.14.2.post4"), ("0.14.5", "0.14.5", "0.14.6"),
        ("0.14.6+torch200cu118", "0.14.5", "0.14.6+torch200cu118"), ("0.15.1", "0.15", "0.15.1"),
        ("0.17.3", "0.17", "0.17.3"), ("0.20.0", "0.20", "0.20.0"), ("0.21", "0.21", "0.21.7"),
    ],
)  # fmt: skip
def test_a_release_is_of_its_level_and_says_its_number(version, level, release):
    module = compat.natten(version=version)
    assert module.__version__ == release
    assert set(modules_of(module)) == set(EXPECTED[level])


@pytest.mark.parametrize("version", ["0.16", "0.16.1", "0.2", "0.17.x", "1.0", "", 0.17, None])
def test_an_unknown_level_is_refused_with_the_known_ones(version):
    with pytest.raises(ValueError, match=r"0\.14, 0\.14\.5, 0\.15, 0\.17, 0\.20, 0\.21"):
        compat.natten(version=version)


def test_a_missing_name_says_which_levels_have_it():
    assert not hasattr(compat.natten(version="0.15"), "context")
    with pytest.raises(AttributeError, match="levels 0.14.5, 0.15, 0.17 have it"):
        compat.natten(version="0.14").functional.natten2dqk  # noqa: B018
    with pytest.raises(AttributeError, match="has no 'na4d'$"):
        compat.natten(version="0.21").functional.na4d  # noqa: B018


def test_the_page_holds_the_generated_table():
    text = (ROOT / "docs" / "migration.md").read_text()
    held = re.search(r"<!-- names -->\n(.*)\n<!-- /names -->", text, re.DOTALL)
    assert held and held[1] == levels.names_table()
    assert all(f"| {level} | `natten.functional` |" in held[1] for level in EXPECTED)


# ---- fresh processes -----------------------------------------------------------------------------------------------


def run(code, *folders, arguments=()):
    """Standard output of a fresh process with some folders first on its path."""
    program = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]}\n{code}"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOOK = """
import importlib.metadata, importlib.util, natten
print(natten.__version__, importlib.metadata.version("natten"), importlib.util.find_spec("natten") is natten.__spec__)
"""


@pytest.fixture
def other_natten(tmp_path):
    """A folder with an installed package of that name."""
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = '9.9'\n")
    (tmp_path / "natten" / "functional.py").write_text("answer = 42\n")
    (tmp_path / "natten-9.9.dist-info").mkdir()
    (tmp_path / "natten-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: natten\nVersion: 9.9\n")
    return tmp_path


def test_everything_that_looks_for_natten_finds_it_and_then_no_more():
    out = run(f"""
from natten_ops import compat
module = compat.install_as_natten(version="0.17.3")
{LOOK}
import natten.utils.checks, natten.flex, natten.types
from natten.functional import na2d, natten2dqkrpb
from natten.na2d import NeighborhoodAttention2D
print(module is natten, natten.utils.checks.__spec__.name, importlib.util.find_spec("natten.flops") is not None)
print(natten.functional.na2d is na2d, sum(d.name == "natten" for d in importlib.metadata.distributions()))
import pickle
again = [pickle.loads(pickle.dumps(item)) for item in (na2d, NeighborhoodAttention2D(8, 2, 3))]
print(again[0] is na2d, type(again[1]) is NeighborhoodAttention2D)
for missing in ("natten.wings", "natten.utils.varlen"):
    try:
        importlib.import_module(missing)
    except ModuleNotFoundError as error:
        print(error)
del sys.modules["natten"]
import natten as again
print(again is module, importlib.reload(again) is module)
compat.install_as_natten(version="0.21")
{LOOK}
print("natten.na2d" in sys.modules)
compat.uninstall()
compat.uninstall()
print([name for name in sys.modules if name.startswith("natten.")], importlib.util.find_spec("natten"))
for look in (lambda: importlib.metadata.version("natten"), lambda: importlib.import_module("natten")):
    try:
        look()
    except ImportError as error:
        print(type(error).__name__)
""")
    assert out.splitlines() == [
        "0.17.3 0.17.3 True", "True natten.utils.checks True", "True 1", "True True", "No module named 'natten.wings'",
        "No module named 'natten.utils.varlen'", "True True", "0.21.7 0.21.7 True", "False", "[] None",
        "PackageNotFoundError", "ModuleNotFoundError",
    ]  # fmt: skip


def test_an_installed_natten_is_hidden_an_imported_one_is_not_unless_forced(other_natten):
    out = run(
        f"""
from natten_ops import compat
compat.install_as_natten(version="0.14.5")
{LOOK}
compat.uninstall()
{LOOK}
import natten.functional
real = natten.functional
for kind in (ValueError, RuntimeError):
    try:
        compat.install_as_natten(version="0.17")
    except kind as error:
        print(error)
print(sys.modules["natten"].__version__, importlib.metadata.version("natten"))
compat.install_as_natten(version="0.17", force=True)
compat.install_as_natten(version="0.20")
{LOOK}
compat.uninstall()
import natten.functional
{LOOK}
print(natten.functional is real, natten.functional.answer)
""",
        other_natten,
    )
    refusal = f"natten is imported already, from {other_natten}/natten/__init__.py; call install_as_natten before"
    assert [line.split(" anything")[0] for line in out.splitlines()] == [
        "0.14.6 0.14.6 True", "9.9 9.9 True", refusal, refusal, "9.9 9.9", "0.20.1 0.20.1 True", "9.9 9.9 True",
        "True 42",
    ]  # fmt: skip
