# SPDX-License-Identifier: MIT
"""What differs between the supported versions of torch, and nothing else."""

from __future__ import annotations

from typing import Any

from torch._inductor import ir
from torch._inductor.codegen.cpp import get_export_declaration
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import parse_expr_with_index_symbols
from torch._inductor.codegen.cpp_utils import LocalBufferContext, cexpr_index
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.lowering import empty_strided
from torch._inductor.select_algorithm import ExternKernelChoice, autotune_select_algorithm
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V

__all__ = [
    "CppTemplate", "ExternKernelChoice", "LocalBufferContext", "V", "cexpr_index", "empty_strided", "get_export_declaration", "hints", "ir",
    "parallel_num_threads", "parse_expr_with_index_symbols", "pick_vec_isa", "select",
]  # fmt: skip


def select(name: str, choices: list[Any], inputs: list[Any], layout: Any) -> Any:
    """The output of the chosen template; torch 2.11 returns the tensor, later ones a tuple that begins with it."""
    result = autotune_select_algorithm(name, choices, inputs, layout)
    return result[0] if isinstance(result, tuple) else result


def hints(expressions: Any) -> tuple[int, ...]:
    """Numbers that sizes are likely to have."""
    return tuple(V.graph.sizevars.optimization_hints(expressions))
