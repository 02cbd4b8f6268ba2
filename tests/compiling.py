# SPDX-License-Identifier: MIT
"""What tests of the compiler share: a compilation of their own, its sources, and what was made of them."""

import re
import subprocess

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Counters of a cached graph stay at zero."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def compile_and_compare(function, *tensors, dynamic=False, tolerance=1e-4):
    """The generated sources; the compiled function gives the eager numbers."""
    with torch.no_grad():
        have, sources = run_and_get_code(torch.compile(function, fullgraph=True, dynamic=dynamic), *tensors)
        want = function(*tensors)
    torch.testing.assert_close(have, want, atol=tolerance, rtol=tolerance)
    return sources


def found():
    """(kernels from the template, ops fused behind them)"""
    inductor = counters["inductor"]
    return inductor["cpp_templated_kernel_counter"], inductor["cpp_epilogue_fusion_counter"]


def rope(x, cosine, sine):
    """Rotary embedding, the halves exchanged by a flip; `sine` has the sign of each half."""
    return x * cosine + x.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sine


def image(*more, rows=9, columns=12, heads=4, dim=16):
    return torch.randn(*more, 2, rows, columns, heads, dim).unbind()


def contractions_of(library):
    """How many instructions multiply and add."""
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"vfn?madd|fmla", code))


def skeleton(source):
    """What a generated program does: tensors that it allocates, kernels, calls."""
    defined = re.findall(r"^(cpp_\w+) = async_compile.*?r'''(.*?)^'''\)", source, re.M | re.S)
    engines = {name for name, body in defined if "natten::Forward<" in body}
    steps = []
    for line in re.search(r"def call\(.*?return", source, re.S)[0].splitlines():
        if new := re.search(r"= empty_strided_cpu\(\((.*?)\), .*torch\.(\w+)\)", line):
            steps.append(f"new {new[2]} [{new[1]}]")
        elif kernel := re.match(r"\s+(cpp_fused\w*)\(", line):
            steps.append("attention and its neighbours" if kernel[1] in engines else "kernel")
        elif call := re.search(r"= torch\.ops\.natten\.(\w+)|^\s+extern_kernels\.(\w+)", line):
            steps.append(f"call {call[1] or call[2]}")
    return "\n".join(steps)
