"""Compiles the kernels for a GPU that is not there: `python -m tests.support.compile_kernels 90 label`.

Prints a line for each: its name, and the bytes of machine code. Triton must not be in its interpreter's mode.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_stepflow.runtime import kernels
from hf_stepflow.vllm import kernels as paged

POINTERS = {
    **dict.fromkeys("query key value cache output out".split(), "*bf16"),
    **dict.fromkeys("caps sinks sums parts means".split(), "*fp32"),
    **dict.fromkeys("records every made table record_table starts lengths on openings".split(), "*i32"),
    **dict.fromkeys("mask padding".split(), "*u8"),
    **dict.fromkeys("ids length opening features transition split_variant split".split(), "*i64"),
    **dict.fromkeys("marker_next marker_found marker_depth counts".split(), "*i64"),
}
NUMBERS = dict.fromkeys("scaling softcap hides alpha".split(), "fp32")
HEADS = {"HEADS": 4, "GROUP": 7, "VALUE_WIDTH": 128, "DV": 128, "HAS_SUMS": True}
ATTENTION = HEADS | {"ROWS": 16, "QUERIES": 2, "HAS_SINKS": True, "ABSOLUTE": True}
KEYS = {"KEYS": 64, "MASK": 1, "HAS_LENGTH": True}
RANGES = {"WIDTH": 128, "D": 128, "HAS_SOFTCAP": True, "BY_STEP": True, "SINK_TOKENS": 4}
RULES = {"SHORTEST": 15, "SPAN": 3, "COLUMNS": 28, "FEATURES": 12, "IMPLICIT": False}
RULES |= dict.fromkeys("HAS_PADDING HAS_LENGTH HAS_OPENING HAS_SPLITS HAS_HEADERS".split(), True)
PAGES = {"GROUP": 7, "WIDTH": 128, "D": 128, "RECORD_TOKENS": 16}
PAGED = PAGES | {"ROWS": 16, "QUERIES": 2, "HAS_SINKS": True, "ABSOLUTE": True}
PAGED_KEYS = {"KEYS": 64, "TOKENS": 16, "WINDOW": 100}
PAGED_RULES = {"SHORTEST": 15, "SPAN": 3, "FEATURES": 12, "RECORD_TOKENS": 16, "IMPLICIT": True}
PAGED_RULES |= dict.fromkeys("HAS_OPENINGS HAS_SPLITS HAS_HEADERS".split(), True)
PAGED_RANGES = {"HAS_SOFTCAP": True, "BY_STEP": True, "SINK_TOKENS": 4}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "attention": (kernels._ranged_attention, ATTENTION | KEYS | RANGES | {"SPLITS": 1}),
    "attention_split": (kernels._ranged_attention, ATTENTION | KEYS | RANGES | {"SPLITS": 4}),
    "merge": (kernels._merge_splits, ATTENTION | {"SPLITS": 4}),
    "inject": (kernels._inject, HEADS | KEYS | {"WINDOW": 5}),
    "label": (kernels._label, RULES),
    "paged_attention": (paged._paged_attention, PAGED | PAGED_KEYS | PAGED_RANGES | {"SPLITS": 1}),
    "paged_attention_split": (paged._paged_attention, PAGED | PAGED_KEYS | PAGED_RANGES | {"SPLITS": 4}),
    "paged_merge": (paged._merge_paged, PAGED | {"SPLITS": 4}),
    "paged_inject": (paged._paged_inject, PAGES | PAGED_KEYS | {"LAST": 5}),
    "paged_label": (paged._paged_label, PAGED_RULES),
}


def compiled(name: str, capability: int) -> bytes:
    """The machine code of a case for a compute capability (90 for Hopper)."""
    kernel, constants = CASES[name]
    names = [parameter.name for parameter in kernel.params]
    types = {one: POINTERS.get(one, NUMBERS.get(one, "i32")) for one in names}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(one),): constant for one, constant in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        print(name, len(compiled(name, int(sys.argv[1]))))
