"""What a compiler may undo and no result shows: loads ahead of their use, loads in flight together, registers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tools import sass
from tools.cuda_report import parse

ARCHITECTURE, TOOLKIT = "sm_90a", "13.0"  # the bounds below are for what this nvcc makes
REGISTERS, THREADS = 65536, 256  # of an SM, and of a block that streams weights
WORDS = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   IADD3 R20, R1, 0x1, RZ ;
        /*0040*/                   HMMA.16816.F32 R24, R6, R8, R24 ;
        /*0050*/                   STG.E desc[UR4][R2.64], R7 ;
        /*0060*/                   LDG.E R9, desc[UR4][R2.64] ;
"""


def test_reads_machine_code() -> None:
    code = sass.instructions(WORDS)
    assert [one.name.partition(".")[0] for one in code] == ["LDC", "LDG", "LDG", "IADD3", "HMMA", "STG", "LDG"]
    assert (code[1].target, code[4].sources, code[5].sources) == (range(4, 8), {6, 7, 8, 9, 24, 25}, {2, 7})
    assert sass.use_distances(code, "LDG.E.128") == [2, 1]
    assert sass.batches(code, "LDG") == [2, 1]


def missing() -> str | None:
    if sass.toolkit() != TOOLKIT:
        return f"nvcc {TOOLKIT} is needed, there is {sass.toolkit() or 'none'}"
    return None if sass.tool("nvdisasm") else "no nvdisasm, neither on the path nor in triton's wheel"


@cache
def kernels(file: str, folder: Path) -> tuple[dict[str, list[sass.Instruction]], dict[str, int]]:
    """The code and the registers of each kernel of a file."""
    cubin, words = sass.compile_kernels(file, ARCHITECTURE, folder)
    return dict(sass.functions(cubin)), {one.name: one.registers for one in parse(words)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


def only(found: dict[str, object], part: str) -> object:
    (name,) = [name for name in found if part in name]
    return found[name]


needs_compiler = [
    pytest.mark.slow,
    pytest.mark.time_limit(7200),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
BF16 = "I13__nv_bfloat16"
PLAIN = BF16 + "S1_"  # the type of x and that of the weights
ONE = PLAIN + "Li1E"  # group of 16 rows of x
PACKED = ("4Int8", "4Int4", "3Fp8")


@pytest.mark.xdist_group("sass")
class TestCompiled:
    pytestmark = needs_compiler

    @pytest.mark.parametrize(
        ("file", "kernel"),
        [("linear", "linear_kernel"), ("linear", "swiglu_kernel"), ("partial_forward", "qkv_kernel")],
    )
    def test_x_is_on_its_way_a_step_ahead(self, folder: Path, file: str, kernel: str) -> None:
        """Of the loop's eight loads of x at least six: numbers of 16 bit were taken apart right after each load."""
        code = only(kernels(file, folder)[0], kernel + ONE)
        of_the_loop = sass.use_distances(code, "LDG.E.128")[16:]  # after the norm's two batches of eight
        assert len(of_the_loop) == 8
        assert sum(distance >= 32 for distance in of_the_loop) >= 6, of_the_loop

    @pytest.mark.parametrize("groups", [2, 4])
    @pytest.mark.parametrize(
        ("file", "kernel"),
        [("linear", "linear_kernel"), ("linear", "swiglu_kernel"), ("partial_forward", "qkv_kernel")],
    )
    def test_so_it_is_where_a_block_takes_many_rows(self, folder: Path, file: str, kernel: str, groups: int) -> None:
        code = only(kernels(file, folder)[0], f"{kernel}{PLAIN}Li{groups}E")
        of_the_loop = sass.use_distances(code, "LDG.E.128")[16 * groups :]
        assert len(of_the_loop) >= 4 * groups  # the loop's, and those before it
        assert min(of_the_loop) >= 32, of_the_loop

    @pytest.mark.parametrize(
        ("file", "kernel", "blocks"),
        [
            ("linear", "linear_kernel" + ONE, 3),
            ("linear", "swiglu_kernel" + ONE, 2),
            ("partial_forward", "qkv_kernel" + ONE, 3),
            *(("linear", f"linear_kernel{PLAIN}Li{groups}E", 2) for groups in (2, 4)),
            *(("partial_forward", f"qkv_kernel{PLAIN}Li{groups}E", 2) for groups in (2, 4)),
            ("linear", f"swiglu_kernel{PLAIN}Li2E", 2),
            ("linear", f"swiglu_kernel{PLAIN}Li4E", 1),
            ("exit_head", f"exit_head_kernel{ONE}Li1E", 3),
            *(
                ("exit_head", f"{kernel}Li4ELi{tiles}E", blocks)
                for kernel in (f"exit_head_kernel{PLAIN}", *(f"packed_head_kernel{BF16}NS_{one}E" for one in PACKED))
                for tiles, blocks in ((1, 2), (4, 1))
            ),
        ],
    )
    def test_so_many_blocks_share_a_multiprocessor(self, folder: Path, file: str, kernel: str, blocks: int) -> None:
        registers = only(kernels(file, folder)[1], kernel)
        assert REGISTERS // (THREADS * -(-registers // 8) * 8) >= blocks, registers  # given in units of eight

    @pytest.mark.parametrize(
        ("file", "kernel", "together"),
        [("verify_attention", "verify_attention_kernel" + BF16, 16), ("exit_head", "exit_head_merge_kernel", 16)],
    )
    def test_partial_results_are_read_together(self, folder: Path, file: str, kernel: str, together: int) -> None:
        """Eight splits, a peak and four sums each; four choices of five numbers."""
        code = only(kernels(file, folder)[0], kernel)
        assert max(sass.batches(code, "LDG")) >= together

    def test_old_keys_are_fetched_before_the_wait(self, folder: Path) -> None:
        names = [one.name for one in only(kernels("verify_attention", folder)[0], "verify_attention_kernel" + BF16)]
        fetches = [at for at, name in enumerate(names) if name.startswith("CCTL.E.PF2")]
        assert len(fetches) >= 2
        assert max(fetches) < names.index("ACQBULK")

    @pytest.mark.parametrize("file", ["linear", "partial_forward", "exit_head", "verify_attention"])
    def test_nothing_lies_in_local_memory(self, folder: Path, file: str) -> None:
        for name, code in kernels(file, folder)[0].items():
            assert [one for one in code if one.name.startswith(("LDL", "STL"))] == [], name
