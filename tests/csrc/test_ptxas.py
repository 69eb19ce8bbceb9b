"""The reading of ptxas's and cuobjdump's output, on recorded samples: needs no nvcc.

ptxas_sample.txt is what nvcc 13.0 printed of kernels with registers too few for some of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ptxas
import pytest

SAMPLE = (Path(__file__).parent / "ptxas_sample.txt").read_text()

# cuobjdump of a kernel for two architectures, cut short
DISASSEMBLY = """
Fatbin elf code:
================
arch = sm_80
\t\tFunction : _ZN6tardkd4cuda14scatter_kernelIfEEvPf
\t.headerflags\t@"EF_CUDA_SM80"
        /*00f0*/                   LDG.E.128.CONSTANT R4, [R4.64] ;           /* 0x0000000404047981 */
                                                                              /* 0x000ea2000c1e9d00 */
        /*0170*/              @!P0 RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R4 ;  /* 0x000000040200798e */
        /*0180*/              @!P0 RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64+0x4], R5 ;
arch = sm_90
\t\tFunction : _ZN6tardkd4cuda14scatter_kernelIfEEvPf
        /*0100*/                   LD.E.128 R4, desc[UR6][R4.64] ;            /* 0x0000000604047981 */
        /*0108*/                   ST.E [R4], R8 ;
        /*010c*/                   LDG.E.128 R4, desc[UR6][R4.64] ;
        /*0110*/                   LDG.E.64 R8, desc[UR6][R8.64] ;
        /*0120*/                   LDG.E R9, desc[UR6][R8.64] ;
        /*0130*/                   STL.64 [R1+0x50], R8 ;
        /*01f0*/               @P1 REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR6][R2.64], R4 ;
        /*0200*/               @P1 ATOMG.E.ADD.F32x4.FTZ.RN.STRONG.GPU PT, R4, desc[UR6][R2.64], R4 ;
        /*0210*/               @P1 ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, RZ, desc[UR6][R2.64], R4 ;
        /*0220*/               @P1 BRA 0x130 ;
        /*0230*/                   EXIT ;

Fatbin ptx code:
================
arch = sm_90
"""


def named(usages):
    names = ptxas.demangle([usage.kernel for usage in usages])
    return [usage._replace(kernel=ptxas.short_name(names[usage.kernel])) for usage in usages]


def test_usage():
    usages = named(ptxas.parse_usage(SAMPLE))
    assert len(usages) == 10
    single, double = "scatter_kernel<float, (Layout)1>", "scatter_kernel<double, (Layout)0>"
    assert ptxas.Usage(double, "sm_75", 32, 0, 376, 880, 1056) in usages
    assert ptxas.Usage(single, "sm_75", 32, 0, 40, 0, 0) in usages
    assert ptxas.Usage(single, "sm_90", 32, 0, 40, 8, 4) in usages
    assert ptxas.Usage("copy_kernel", "sm_90", 30, 256, 0, 0, 0) in usages
    assert ptxas.Usage("decide<float>", "sm_90", None, 0, 0, 48, 48) in usages  # called, not inlined


def test_the_worst_of_one_name_counts():
    usages = [ptxas.Usage("f", "sm_90", None, 0, 0, 8, 0), ptxas.Usage("f", "sm_90", None, 0, 16, 4, 4)]
    other = ptxas.Usage("f", "sm_80", None, 0, 0, 0, 0)
    assert ptxas.merge([*usages, other]) == [ptxas.Usage("f", "sm_90", None, 0, 16, 8, 4), other]


def test_a_report_of_another_form_is_not_taken_for_an_empty_one():
    with pytest.raises(ValueError, match="not understood"):
        ptxas.parse_usage(SAMPLE.replace("bytes stack frame", "B of stack"))


def test_spills_of_hot_kernels_alone_are_complained_of():
    usages = named(ptxas.parse_usage(SAMPLE))
    assert ptxas.spills(usages) == [
        "decide<float> on sm_75: 40 and 48 bytes spilled",
        "scatter_kernel<float, (Layout)1> on sm_90: 8 and 4 bytes spilled",
        "decide<float> on sm_90: 48 and 48 bytes spilled",
    ]


@pytest.mark.parametrize(
    "name, short, hot",
    [
        ("tardkd::cuda::plain(double*, int)", "plain", True),
        ("void tardkd::cuda::(anonymous namespace)::f<float>(tardkd::Pyramid)", "f<float>", True),
        ("void a::f<float, (a::(anonymous namespace)::Kind)1>(a::B<double>)", "f<float, (Kind)1>", True),
        ("void f<__half, double>(float*)", "f<__half, double>", False),
        ("bool _INTERNAL_1_cu::a::(anonymous namespace)::g<float>(a::B<float> const&)", "g<float>", True),
    ],
)
def test_names(name, short, hot):
    assert ptxas.short_name(name) == short
    assert ptxas.is_hot(short) == hot


def test_disassembly():
    counts = ptxas.parse_disassembly(DISASSEMBLY)
    kernel = "_ZN6tardkd4cuda14scatter_kernelIfEEvPf"
    assert counts == {
        (kernel, "sm_80"): {"16-byte loads": 1, "scalar adds": 2},
        (kernel, "sm_90"): {
            "16-byte loads": 1,
            "8-byte loads": 1,
            "generic 16-byte accesses": 1,
            "generic accesses": 2,
            "local": 1,
            "vector adds": 1,
            "adds that return": 2,
            "local in loops": 1,
            "vector adds in loops": 1,
            "adds that return in loops": 2,
        },
    }


def test_missing_vector_accesses_are_complained_of(monkeypatch):
    counts = {("scatter<float>", name): {"vector adds": adds} for name, adds in (("sm_80", 0), ("sm_90", 4))}
    expected = (("scatter<", 90, "vector adds"),)
    monkeypatch.setattr(ptxas, "EXPECTED", expected)
    assert ptxas.narrow_accesses(counts) == []
    counts["scatter<float>", "sm_90"]["vector adds"] = 0
    assert ptxas.narrow_accesses(counts) == ["scatter<float> on sm_90: no vector adds"]
    monkeypatch.setattr(ptxas, "EXPECTED", (("gather", 75, "16-byte loads"),))
    assert ptxas.narrow_accesses(counts) == ["gather: there is no such kernel"]


def test_forbidden_instructions_of_hot_kernels_are_complained_of():
    counts = {
        (kernel, "sm_90"): Counter({"adds that return": 2, "generic accesses": 3, "local in loops": 1})
        for kernel in ("scatter<float>", "scatter<double>")
    }
    assert ptxas.forbidden(counts) == [
        "scatter<float> on sm_90: 2 adds that return",
        "scatter<float> on sm_90: 1 local in loops",
    ]


def test_table_gives_one_value_where_the_architectures_agree():
    text = ptxas.table(named(ptxas.parse_usage(SAMPLE)), {})
    assert "| `copy_kernel` | 30 | 256 | 0 | 0 | 0 |" in text
    assert "| `scatter_kernel<float, (Layout)1>` | 32 | 0 | 40 | 0 / 8 | 0 / 4 |" in text
    assert "| `decide<float>` |  | 0 | 0 | 40 / 48 | 48 |" in text
