# SPDX-License-Identifier: MIT
"""The settings of natten's context: fields in one table, getters and setters made from two more, state in one object.

They chose among kernels and had no effect on what is computed; here they have no effect at all. They are kept so that
a model that sets one and reads it back goes on, and what contradicted then contradicts now.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from natten_ops import backends
from natten_ops.compat.errors import ConstraintError, ConstraintTypeError
from natten_ops.compat.rows import LEVELS, Place, Row
from natten_ops.compat.types import MemoryUsagePreference

_log = logging.getLogger("natten_ops")
AT_017 = ("0.17",)
FROM_017 = LEVELS[LEVELS.index("0.17") :]
FROM_020 = LEVELS[LEVELS.index("0.20") :]


class Field(NamedTuple):
    """A setting: its type, its value at first, and that from 0.20 on where it differs."""

    kind: type
    default: Any
    from_020: Any = None


FIELDS = {
    "deterministic": Field(bool, False),
    "fused": Field(bool, False),
    "kv_parallelism": Field(bool, False, from_020=True),
    "flex": Field(bool, False),
    "force_flex": Field(bool, False),
    "memory": Field(MemoryUsagePreference, MemoryUsagePreference.Default),
    "tune_forward": Field(bool, False),
    "tune_backward": Field(bool, False),
    "thorough_forward": Field(bool, False),
    "thorough_backward": Field(bool, False),
    "warmup_steps_forward": Field(int, 5),
    "warmup_steps_backward": Field(int, 5),
    "steps_forward": Field(int, 5),
    "steps_backward": Field(int, 5),
    "tf32": Field(bool, True),
    "tiled": Field(bool, True),
    "gemm": Field(bool, True),
    "flex_compile": Field(bool, False),
    "flex_compile_backprop": Field(bool, False),
}
# What deterministic mode forbids to switch on.
NOT_DETERMINISTIC = ("kv_parallelism", "tune_forward", "tune_backward")
TUNER = ("tune_forward", "tune_backward", "thorough_forward", "thorough_backward", "warmup_steps_forward",
         "warmup_steps_backward", "steps_forward", "steps_backward")  # fmt: skip


class State:
    """All that compat remembers: the settings of each level that differ from their defaults."""

    def __init__(self) -> None:
        self.changed: dict[tuple[str, str], Any] = {}

    def get(self, level: str, field: str) -> Any:
        """The value of a setting."""
        _, default, from_020 = FIELDS[field]
        if level in FROM_020 and from_020 is not None:
            default = from_020
        return self.changed.get((level, field), default)

    def update(self, level: str, values: dict[str, tuple[str, Any]]) -> None:
        """Set {field: (argument, value)}, all or none; what contradicts torch's own deterministic mode stays as it is.

        Raises:
            ValueError: a value that the field cannot have, or one that contradicts natten's deterministic mode.
        """
        checked = {field: _checked(FIELDS[field].kind, *given) for field, given in values.items()}
        for field in NOT_DETERMINISTIC:
            if not checked.get(field):
                continue
            if torch.are_deterministic_algorithms_enabled():
                _log.warning("%s=True is ignored: torch's deterministic mode is on", values[field][0])
                del checked[field]
            elif self.get(level, "deterministic"):
                argument = values[field][0]
                raise ConstraintError(
                    f"{argument}=True contradicts deterministic mode; call use_deterministic_algorithms(False) first"
                )
        self.changed.update({(level, field): value for field, value in checked.items()})

    def reset(self, level: str | None = None, fields: tuple[str, ...] = tuple(FIELDS)) -> None:
        """Back to the defaults: everything, or some fields of one level."""
        for key in list(self.changed):
            if level in (None, key[0]) and key[1] in fields:
                del self.changed[key]


STATE = State()


def reset() -> None:
    """Bring every setting of every level back to its default; what is installed stays installed.

    Example:
        >>> from natten_ops import compat
        >>> context = compat.natten(version="0.17").context
        >>> context.use_fused_na()
        >>> compat.reset()
        >>> context.is_fused_na_enabled()
        False
    """
    STATE.reset()


def _small(preference: MemoryUsagePreference) -> str:
    return preference.name.lower()


def _checked(kind: type, argument: str, value: Any) -> Any:
    if kind is MemoryUsagePreference and not isinstance(value, kind):
        names = {_small(member): member for member in MemoryUsagePreference}
        if not isinstance(value, str) or value not in names:
            raise ConstraintError(f"{argument}={value!r} is unknown; give one of {', '.join(map(repr, names))}")
        return names[value]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        article = "True or False" if kind is bool else "an int"
        raise ConstraintTypeError(f"{argument}={value!r} is a {type(value).__name__}; give {article}")
    return value


class Getter:
    """A function that tells a setting: whether one of `fields` is set, or what it is, or whether it `equals`."""

    def __init__(self, *fields: str, equals: Any = None) -> None:
        self.fields, self.equals = fields, equals
        self.__doc__ = f"The setting {' or '.join(fields)}; it has no effect on what natten_ops computes."

    def __call__(self, place: Place) -> Any:
        values = [STATE.get(place.level, field) for field in self.fields]
        value = values[0] if len(values) == 1 else any(values)
        return value if self.equals is None else value == self.equals


class Setter:
    """A function that changes settings: {field: name of an argument, or the value itself}.

    An argument that is None leaves its field. If `switch` names an argument that is False, every field is set to False.
    `returns` names a field whose value is returned.
    """

    def __init__(self, fields: dict[str, Any], switch: str = "", returns: str = "") -> None:
        self.fields, self.switch, self.returns = fields, switch, returns
        self.__doc__ = f"Sets {', '.join(fields)}; no effect on what natten_ops computes. It keeps what it is given."

    def __call__(self, place: Place, **arguments: Any) -> Any:
        values = {}
        for field, source in self.fields.items():
            name = source if isinstance(source, str) else field
            value = arguments[source] if isinstance(source, str) else source
            if self.switch and arguments[self.switch] is False:
                value = False
            if value is not None:
                values[field] = (name, value)
        STATE.update(place.level, values)
        return STATE.get(place.level, self.returns) if self.returns else None


class ContextType(type):
    """NattenContext and AutotunerContext were classes whose attributes were the settings; here those of the one state."""

    _level: str
    _fields: dict[str, str]

    def __getattr__(cls, name: str) -> Any:
        if name in cls._fields:
            return STATE.get(cls._level, cls._fields[name])
        if name.removeprefix("set_") in cls._fields:
            return functools.partial(cls._set, name.removeprefix("set_"))
        raise AttributeError(f"no setting {name!r}; there are {', '.join(cls._fields)}")

    def __setattr__(cls, name: str, value: Any) -> None:
        if name not in cls._fields:
            raise AttributeError(f"no setting {name!r}; there are {', '.join(cls._fields)}")
        cls._set(name, value)

    def __delattr__(cls, name: str) -> None:
        STATE.reset(cls._level, (cls._fields[name],))  # what mock.patch does at the end

    def _set(cls, name: str, value: Any) -> None:
        if value is not None:
            STATE.update(cls._level, {cls._fields[name]: (name, value)})


class Context(metaclass=ContextType):
    """What the two classes have beside their settings."""

    _level = ""
    _fields: dict[str, str] = {}

    @classmethod
    def reset(cls) -> None:
        """The settings of this level and kind back to their defaults."""
        STATE.reset(cls._level, tuple(cls._fields.values()))


CONTEXT_FIELDS = {
    "NattenContext": {
        "is_deterministic_mode_enabled": "deterministic",
        "is_fused_na_enabled": "fused",
        "is_kv_parallelism_enabled": "kv_parallelism",
        "use_flex_attention": "flex",
        "force_flex_attention": "force_flex",
        "training_memory_preference": "memory",
        "flex_compile_allowed": "flex_compile",
        "flex_compile_backprop_allowed": "flex_compile_backprop",
    },
    "AutotunerContext": {
        "enabled_for_forward": "tune_forward",
        "enabled_for_backward": "tune_backward",
        "thorough_mode_forward": "thorough_forward",
        "thorough_mode_backward": "thorough_backward",
    }
    | {name: name for name in TUNER[4:]},
}


def context_of(row: Row, place: Place) -> ContextType:
    """The context class of a level."""
    text = f"The settings of natten {place.level} as attributes; they have no effect on what natten_ops computes."
    members = {
        "_level": place.level,
        "_fields": CONTEXT_FIELDS[place.name],
        "__doc__": text,
        "__module__": place.module,
    }
    return ContextType(place.name, (Context,), members)


# ---- what runs where -----------------------------------------------------------------------------------------------


def has_cuda(place: Place) -> bool:
    """Whether CUDA kernels of natten_ops are installed and a CUDA device is there."""
    problem = backends.Problem("cuda", torch.float32)
    kernels = any(b.id is not None and not b.why_not(problem) for b in backends.BACKENDS)
    return kernels and torch.cuda.is_available()


class Runs:
    """The function that tells whether our kernels take a dtype on a device."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        what = "TF32 products" if dtype is None else f"{str(dtype).removeprefix('torch.')} tensors"
        self.__doc__ = (
            f"Whether the kernels of natten_ops take {what} on a device: the index of a CUDA device, any torch.device, "
            f"or None for the CUDA device if there are CUDA kernels and for the CPU else, where the answer is that of "
            f"the CPU kernels."
        )

    def __call__(self, place: Place, *, device_index: Any = None) -> bool:
        if device_index is None:
            device = "cuda" if has_cuda(place) else "cpu"
        else:
            device = "cuda" if isinstance(device_index, int) else torch.device(device_index).type
        if device == "cuda" and not has_cuda(place):
            return False
        if self.dtype is None:
            return not backends.by_name("cuda-mma-tf32").why_not(backends.Problem(device, torch.float32))
        problem = backends.Problem(device, self.dtype)
        return any(b.id is not None and not b.why_not(problem) for b in backends.BACKENDS)


def get_device_cc(place: Place, *, device_index: Any = None) -> int:
    """Compute capability of a CUDA device times ten, as 80 for 8.0; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


# ---- the rows ------------------------------------------------------------------------------------------------------

_DEVICE = "device_index=None"
# natten had them in two modules: the root first, their home last.
_CONTEXT, _OLD = "natten natten.context", "natten natten.functional"
_TUNER_ARGUMENTS = {field: field for field in TUNER} | {
    "tune_forward": "forward_pass", "tune_backward": "backward_pass",
    "thorough_forward": "thorough_mode_forward", "thorough_backward": "thorough_mode_backward",
}  # fmt: skip
_FUSED = {
    "fused": "mode", "kv_parallelism": "kv_parallel", "flex": "use_flex_attention", "force_flex": "force_flex_attention",
}  # fmt: skip
_DIRECTIONS = ("forward", "backward")


def _row(names: str, parameters: str, target: Callable[..., Any], levels: tuple[str, ...] = AT_017) -> Row:
    return Row(names, _CONTEXT, levels, parameters, target)


def _switch(name: str, field: str) -> tuple[Row, ...]:
    """use_, is_.._enabled, and the older enable_ and disable_, which return the state."""
    short = name.removesuffix("_in_gemm_na")
    old = [(f"enable_{short}", True), (f"disable_{short}", False)]
    rows = [_row(f"use_{name}", "mode=True", Setter({field: "mode"})), _row(f"is_{name}_enabled", "", Getter(field))]
    rows += [_row(new, "", Setter({field: value}, returns=field)) for new, value in old]
    return (*rows, *(Row(new, _OLD, ("0.15",), "", Setter({field: value}, returns=field)) for new, value in old))


_HAS = {
    "has_half": torch.float16, "has_bfloat": torch.bfloat16, "has_gemm": torch.float32, "has_tf32_gemm": None,
    "has_fp32_gemm": torch.float32, "has_fp64_gemm": torch.float64,
}  # fmt: skip

ROWS: tuple[Row, ...] = (
    Row("NattenContext", "natten.context", FROM_017, "", None, make=context_of),
    Row("AutotunerContext", "natten.context", AT_017, "", None, make=context_of),
    _row("use_deterministic_algorithms", "mode=True", Setter({"deterministic": "mode"}), FROM_017),
    _row("are_deterministic_algorithms_enabled", "", Getter("deterministic"), FROM_017),
    _row("use_kv_parallelism_in_fused_na", "mode=True", Setter({"kv_parallelism": "mode"}), FROM_017),
    _row("is_kv_parallelism_in_fused_na_enabled", "", Getter("kv_parallelism"), FROM_017),
    _row("set_memory_usage_preference", "pref='default'", Setter({"memory": "pref"}), FROM_017),
    _row("get_memory_usage_preference", "", Getter("memory"), FROM_017),
    *(
        _row(f"is_memory_usage_{_small(preference)}", "", Getter("memory", equals=preference), FROM_017)
        for preference in MemoryUsagePreference
    ),
    _row(
        "use_fused_na use_fna",
        "mode=True, kv_parallel=True, use_flex_attention=False, force_flex_attention=False",
        Setter(_FUSED, switch="mode"),
    ),
    _row("is_fused_na_enabled is_fna_enabled", "", Getter("fused")),
    _row("use_flex_attention", "", Setter({**dict.fromkeys(_FUSED, True), "force_flex": False})),
    _row("force_flex_attention", "", Setter(dict.fromkeys(_FUSED, True))),
    Row("should_use_flex_attention", "natten.context", AT_017, "", Getter("flex")),
    Row("should_force_flex_attention", "natten.context", AT_017, "", Getter("force_flex")),
    _row(
        "use_autotuner", ", ".join(f"{name}=None" for name in _TUNER_ARGUMENTS.values()), Setter(_TUNER_ARGUMENTS)
    ),
    _row("disable_autotuner", "", Setter(dict.fromkeys(TUNER[:4], False))),
    _row("is_autotuner_enabled", "", Getter("tune_forward", "tune_backward")),
    *(_row(f"is_autotuner_enabled_for_{direction}", "", Getter(f"tune_{direction}")) for direction in _DIRECTIONS),
    *(_row(f"is_autotuner_thorough_for_{direction}", "", Getter(f"thorough_{direction}")) for direction in _DIRECTIONS),
    *_switch("tf32_in_gemm_na", "tf32"),
    *_switch("tiled_na", "tiled"),
    *_switch("gemm_na", "gemm"),
    _row("has_cuda", "", has_cuda),
    Row("has_cuda", _OLD, ("0.15",), "", has_cuda),
    _row("has_fna has_fused_na", _DEVICE, Runs(torch.float32)),
    *(_row(name, _DEVICE, Runs(dtype)) for name, dtype in _HAS.items()),
    *(Row(name, _OLD, ("0.15",), _DEVICE, Runs(dtype)) for name, dtype in _HAS.items()),
    Row("get_device_cc", "natten.functional", ("0.15",), _DEVICE, get_device_cc),
    Row("get_device_cc", "natten.functional natten.utils", AT_017, _DEVICE, get_device_cc),
    _row("is_flex_compile_allowed", "", Getter("flex_compile"), FROM_020),
    _row("is_flex_compile_backprop_allowed", "", Getter("flex_compile_backprop"), FROM_020),
    _row(
        "allow_flex_compile", "mode=True, backprop=False",
        Setter({"flex_compile": "mode", "flex_compile_backprop": "backprop"}, switch="mode"), FROM_020,
    ),
    _row("allow_flex_compile_backprop", "mode=True", Setter({"flex_compile_backprop": "mode"}), FROM_020),
    _row("disable_flex_compile", "", Setter({"flex_compile": False, "flex_compile_backprop": False}), FROM_020),
    _row("disable_flex_compile_backprop", "", Setter({"flex_compile_backprop": False}), FROM_020),
)  # fmt: skip
