"""The interpreter of PTX (csrc/ptx_on_cpu): that it computes what PTX says, and finds what breaks a rule."""

from __future__ import annotations

import struct

import ptx_on_cpu
import pytest
import torch

pytestmark = pytest.mark.ptx

HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"
# %r1: the thread's number, %r2: that of the block, %r3: the thread's in the grid, whose element of the tensor %rd1 is
# at %rd2; %r5: the thread's word of shared memory; %p1: the first thread's.
START = """
    ld.param.u64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mad.lo.s32 %r3, %r2, %r4, %r1;
    mul.wide.u32 %rd3, %r3, 4;
    add.s64 %rd2, %rd1, %rd3;
    shl.b32 %r5, %r1, 2;
    setp.eq.u32 %p1, %r1, 0;
"""


@pytest.fixture
def module():
    module = ptx_on_cpu.load()
    module.reset()
    module.set_architecture(90)
    yield module
    module.restore()
    module.forbid_all()


def run(module, body, tensor=None, blocks=1, threads=32, shared=0, functions=""):
    """Returns the tensor, of 32-bit elements, after a kernel that has its address."""
    tensor = torch.zeros(blocks * threads, dtype=torch.int32) if tensor is None else tensor
    module.forbid_all()
    module.allow(tensor.data_ptr(), tensor.numel() * 4, 4)
    module.restore()
    module.replace(f"{HEAD}{functions}.entry kernel(\n.param .u64 kernel_param_0\n)\n{{\n{START}{body}\nret;\n}}\n")
    module.launch("kernel", blocks, threads, shared, struct.pack("q", tensor.data_ptr()))
    return tensor


def finding(module, body, **options):
    with pytest.raises(RuntimeError, match="breaks rules") as error:
        run(module, body, **options)
    return str(error.value)


# --- what it computes ----------------------------------------------------------------------------------

MOST, LEAST = 2**31 - 1, -(2**31)


def bits(value: float) -> str:
    return f"0f{struct.unpack('I', struct.pack('f', value))[0]:08X}"


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("add.s32 %r9, 2147483647, 1", LEAST),
        ("mul.lo.s32 %r9, 65536, 65536", 0),
        ("mul.hi.s32 %r9, -2, 3", -1),
        ("mul.hi.u32 %r9, 65536, 65536", 1),
        ("div.s32 %r9, -7, 2", -3),
        ("div.s32 %r9, 7, 0", -1),
        ("rem.s32 %r9, -7, 2", -1),
        ("min.s32 %r9, -1, 1", -1),
        ("min.u32 %r9, -1, 1", 1),
        ("abs.s32 %r9, -5", 5),
        ("shl.b32 %r9, 1, 33", 0),
        ("shr.s32 %r9, -8, 1", -4),
        ("shr.s32 %r9, -8, 99", -1),
        ("shr.u32 %r9, -8, 99", 0),
        ("popc.b32 %r9, 255", 8),
        ("clz.b32 %r9, 1", 31),
        ("brev.b32 %r9, 1", LEAST),
        ("brev.b32 %r9, 19088743", -425540480),
        ("bfind.shiftamt.u32 %r9, 1", 31),
        ("bfind.shiftamt.u32 %r9, 0", -1),
        ("not.b32 %r9, 0", -1),
        ("cvt.rzi.s32.f32 %r9, " + bits(-2.7), -2),
        ("cvt.rni.s32.f32 %r9, " + bits(2.5), 2),
        ("cvt.rpi.s32.f32 %r9, " + bits(2.1), 3),
        ("cvt.rmi.s32.f32 %r9, " + bits(-2.1), -3),
        ("cvt.rzi.s32.f32 %r9, " + bits(1e20), MOST),
        ("cvt.rzi.s32.f32 %r9, " + bits(-1e20), LEAST),
        ("cvt.rzi.s32.f32 %r9, " + bits(float("nan")), 0),
        ("cvt.rzi.u32.f32 %r9, " + bits(-1.0), 0),
        ("cvt.s32.s8 %r9, 255", -1),
        ("cvt.u32.u8 %r9, 511", 255),
        ("cvt.rn.f16.f32 %r9, " + bits(1.0), 0x3C00),
        ("cvt.rn.bf16.f32 %r9, " + bits(1.0), 0x3F80),
        ("selp.b32 %r9, 3, 4, %p1", 3),
        ("add.s32 %r9, %r4, 0", 32),
    ],
)
def test_integers(module, instruction, expected):
    assert run(module, f"{instruction}; @%p1 st.global.u32 [%rd2], %r9;")[0] == expected


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("add.f32 %f9, " + bits(1.0) + ", " + bits(2**-24), 1.0),
        ("add.rp.f32 %f9, " + bits(1.0) + ", " + bits(2**-24), 1 + 2**-23),
        ("fma.rn.f32 %f9, " + f"{bits(1 + 2**-12)}, {bits(1 + 2**-12)}, {bits(-1.0)}", 2**-11 + 2**-24),
        ("fma.rm.f32 %f9, " + f"{bits(-(2**-24))}, {bits(1.0)}, {bits(1.0)}", 1 - 2**-24),
        ("fma.rz.f32 %f9, " + f"{bits(2**-25)}, {bits(1.0)}, {bits(-1.0)}", -(1 - 2**-24)),
        ("min.f32 %f9, " + f"{bits(float('nan'))}, {bits(3.0)}", 3.0),
        ("max.f32 %f9, " + f"{bits(3.0)}, {bits(float('nan'))}", 3.0),
        ("neg.f32 %f9, " + bits(2.0), -2.0),
        ("div.rn.f32 %f9, " + f"{bits(1.0)}, {bits(0.0)}", float("inf")),
        ("sqrt.rn.f32 %f9, " + bits(2.0), 1.4142135381698608),
        ("ex2.approx.ftz.f32 %f9, " + bits(3.0), 8.0),
        ("cvt.rn.f32.s32 %f9, -3", -3.0),
        ("cvt.rn.f32.u64 %f9, 18446744073709551615", 2.0**64),
        ("cvt.f32.f16 %f9, 15360", 1.0),
        ("cvt.f32.bf16 %f9, 16256", 1.0),
        ("cvt.sat.f32.f32 %f9, " + bits(-3.0), 0.0),
        ("@%p1 cvt.sat.f32.f32 %f9, " + bits(3.0), 1.0),
        ("setp.ne.u32 %p2, %r1, 0; @!%p2 cvt.rn.f32.s32 %f9, 7", 7.0),
        ("cvt.rpi.f32.f32 %f9, " + bits(1.1), 2.0),
    ],
)
def test_floats(module, instruction, expected):
    tensor = run(module, f"{instruction}; @%p1 st.global.f32 [%rd2], %f9;", torch.zeros(32))
    assert tensor[0] == expected


@pytest.mark.parametrize("relation, expected", [("lt", 0), ("ne", 0), ("neu", 1), ("geu", 1), ("nan", 1), ("eq", 0)])
def test_comparisons_with_what_is_no_number(module, relation, expected):
    compare = f"setp.{relation}.f32 %p2, {bits(float('nan'))}, {bits(1.0)}; selp.b32 %r9, 1, 0, %p2;"
    assert run(module, f"{compare} st.global.u32 [%rd2], %r9;")[0] == expected


def test_lanes_that_part_meet_again(module):
    """Odd lanes run twice around a loop; a vote over all of them comes after it."""
    tensor = run(
        module,
        """
        and.b32 %r6, %r1, 1;
        mov.u32 %r7, 0;
        LOOP:
        add.s32 %r7, %r7, 1;
        setp.le.s32 %p2, %r7, %r6;
        @%p2 bra LOOP;
        setp.eq.s32 %p3, %r7, 2;
        vote.sync.ballot.b32 %r8, %p3, -1;
        st.global.u32 [%rd2], %r8;
        """,
    )
    assert tensor.tolist() == [LEAST + 0x2AAAAAAA] * 32


@pytest.mark.parametrize(
    "how, by, sources",
    [
        ("bfly", "1, 31", [lane ^ 1 for lane in range(32)]),
        ("up", "2, 0", [lane - 2 if lane >= 2 else lane for lane in range(32)]),
        ("down", "2, 31", [lane + 2 if lane < 30 else lane for lane in range(32)]),
        ("idx", "1, 6175", [lane // 8 * 8 + 1 for lane in range(32)]),  # segments of 8 lanes
    ],
)
def test_shuffles(module, how, by, sources):
    assert run(module, f"shfl.sync.{how}.b32 %r9, %r1, {by}, -1; st.global.u32 [%rd2], %r9;").tolist() == sources


def test_functions_are_called(module):
    function = """
    .func (.param .b32 result) twice(.param .b32 given)
    {
        ld.param.b32 %r1, [given];
        add.s32 %r1, %r1, %r1;
        st.param.b32 [result], %r1;
        ret;
    }
    """
    call = """
    {
        .param .b32 a;
        .param .b32 b;
        st.param.b32 [a], %r1;
        call.uni (b), twice, (a);
        ld.param.b32 %r9, [b];
    }
    st.global.u32 [%rd2], %r9;
    """
    assert run(module, call, functions=function).tolist() == [2 * lane for lane in range(32)]


def test_atomics_add_and_return_what_was_there(module):
    tensor = run(module, "atom.global.add.u32 %r9, [%rd1], 1; @%p1 bra END; st.global.u32 [%rd2], %r9; END:")
    assert tensor.tolist() == [32, *range(1, 32)]


@pytest.mark.parametrize(
    "instruction", ["lop3.b32 %r1, %r1, %r1, %r1, 1", "ld.global.cv.u32 %r1, [%rd2]", "sin.f32 %f1"]
)
def test_what_is_not_known_is_named(module, instruction):
    with pytest.raises(RuntimeError, match=rf"line \d+: {instruction.replace('[', '.').replace(']', '.')}: .*known"):
        run(module, instruction + ";")


def test_findings_name_the_source_and_the_instruction(module):
    load = ".loc 1 12 3\nld.global.u32 %r9, [%rd2+4];"
    run_with_source = f'{load} ret; }}\n.file\t1 "/some/where/pool.cuh"\n.func (.param .b32 x) unused() {{'
    assert "out of bounds | pool.cuh:12 | ld.global.u32 %r9, [%rd2+4]" in finding(module, run_with_source)


# --- rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, rule",
    [
        ("ld.global.u64 %rd9, [%rd2];", "misaligned access"),
        ("ld.global.u32 %r9, [%rd2+4];", "1 times global memory out of bounds"),
        ("ld.global.u32 %r9, [%rd2+-4];", "1 times global memory out of bounds"),
        ("mov.u64 %rd9, 0; ld.global.u32 %r9, [%rd9];", "null pointer"),
        ("st.shared.u32 [%r5+4], %r1;", "1 times shared memory out of bounds"),
        ("ld.param.u64 %rd9, [kernel_param_0+8];", "parameters out of bounds"),
        ("ld.shared.u32 %r9, [%r5];", "shared memory is read that nobody has written"),
        ("st.global.u32 [%rd1], %r1;", "race: write after write"),
        ("setp.lt.u32 %p2, %r1, 9; @%p2 vote.sync.ballot.b32 %r9, %p1, 255;", "a lane outside the mask"),
        ("shfl.sync.idx.b32 %r9, %r1, 9, 31, 255;", "a lane outside the mask"),
        (
            "setp.lt.u32 %p2, %r1, 8; @%p2 shfl.sync.idx.b32 %r9, %r1, 9, 31, 255;",
            "a shuffle from a lane that does not",
        ),
    ],
)
def test_what_breaks_a_rule(module, body, rule):
    assert rule in finding(module, body, shared=128)


def exchange(between: str, neighbour: int) -> str:
    """A thread writes a word and reads that of another, whose number differs in one bit."""
    return f"xor.b32 %r6, %r5, {4 * neighbour}; st.shared.u32 [%r5], %r1; {between} ld.shared.u32 %r9, [%r6];"


@pytest.mark.parametrize(
    "between, neighbour, is_race",
    [
        ("", 1, True),
        ("bar.warp.sync -1;", 1, False),
        ("bar.warp.sync -1;", 32, True),
        ("bar.sync 0;", 1, False),
        ("bar.sync 0;", 32, False),
        ("membar.gl;", 32, True),
        ("shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;", 1, True),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_races_within_a_block(module, between, neighbour, is_race, seed):
    module.set_seed(seed)
    options = dict(threads=64, shared=256)
    if is_race:
        assert "race: read after write" in finding(module, exchange(between, neighbour), **options) or seed
    else:
        run(module, exchange(between, neighbour), **options)


def test_a_race_with_who_has_read(module):
    read = "st.shared.u32 [%r5], %r1; bar.sync 0; xor.b32 %r6, %r5, 128; ld.shared.u32 %r9, [%r6];"
    assert "race: write after read" in finding(module, read + "st.shared.u32 [%r5], %r1;", threads=64, shared=256)
    run(module, read + "bar.sync 0; st.shared.u32 [%r5], %r1;", threads=64, shared=256)


def last_block(
    release="atom.acq_rel.gpu.global.add.u32 %r9, [%rd9], 1;", barrier="bar.sync 0;", load="ld.global.cg.u32"
):
    """Two blocks of 64 write a word a thread; the one that comes last reads what the other has written."""
    return f"""
    st.global.u32 [%rd2], %r1;
    {barrier}
    add.s64 %rd9, %rd1, 512;
    @!%p1 bra WAIT;
    {release}
    st.shared.u32 [memory], %r9;
    WAIT:
    bar.sync 0;
    ld.shared.u32 %r9, [memory];
    setp.eq.u32 %p2, %r9, 0;
    @%p2 bra END;
    xor.b32 %r6, %r3, 64;
    mul.wide.u32 %rd5, %r6, 4;
    add.s64 %rd5, %rd1, %rd5;
    {load} %r9, [%rd5];
    END:
    """


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "changed, rule",
    [
        ({}, None),
        (dict(release="membar.gl; atom.global.add.u32 %r9, [%rd9], 1;"), "race: read after write of another block"),
        (dict(barrier="membar.gl; bar.sync 0;", release="atom.global.add.u32 %r9, [%rd9], 1;"), None),
        (dict(release="atom.global.add.u32 %r9, [%rd9], 1;"), "race: read after write of another block"),
        (dict(barrier=""), "race: read after write of another block"),
        (dict(load="ld.global.u32"), "read through the first-level cache"),
    ],
)
def test_races_between_blocks(module, changed, rule, seed):
    module.set_seed(seed)
    options = dict(tensor=torch.zeros(129, dtype=torch.int32), blocks=2, threads=64, shared=4)
    if rule is None:
        run(module, last_block(**changed), **options)
    else:
        assert rule in finding(module, last_block(**changed), **options)


def test_barriers_that_not_all_meet(module):
    part = "setp.lt.u32 %p2, %r1, 32; @%p2 bra OTHER; bar.sync 0; bra END; OTHER: bar.sync 0; END:"
    assert "threads of a block at different barriers" in finding(module, part, threads=64)
    waits = "setp.lt.u32 %p2, %r1, 16; @%p2 bra OTHER; bar.sync 0; OTHER: vote.sync.ballot.b32 %r9, %p1, -1;"
    with pytest.raises(RuntimeError, match="kernel: deadlock at"):
        run(module, waits)


def test_orders_are_random(module):
    """Who comes first to a counter, in every block and among the blocks."""
    body = "atom.global.add.u32 %r9, [%rd1+1024], 1; st.global.u32 [%rd2], %r9;"
    orders = set()
    for seed in range(4):
        module.set_seed(seed)
        tensor = run(module, body, torch.zeros(257, dtype=torch.int32), blocks=2, threads=128)
        orders.add(tuple(tensor[:256].tolist()))
        assert sorted(tensor[:256].tolist()) == list(range(256))
        assert (seed == 0) == (tensor[:256].tolist() == list(range(256)))
    assert len(orders) == 4


# --- what is counted -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "access, units, fewest",
    [
        ("st.global.u32 [%rd2], %r1;", 4, 4),
        ("mul.wide.u32 %rd5, %r1, 32; add.s64 %rd5, %rd1, %rd5; st.global.u32 [%rd5], %r1;", 32, 4),
        ("ld.global.u32 %r9, [%rd1];", 1, 1),
        ("st.shared.u32 [%r5], %r1;", 1, 1),
        ("shl.b32 %r6, %r1, 3; st.shared.u32 [%r6], %r1;", 2, 1),
        ("shl.b32 %r6, %r1, 7; st.shared.u32 [%r6], %r1;", 32, 1),
        ("shl.b32 %r6, %r1, 4; st.shared.v4.u32 [%r6], {%r1, %r1, %r1, %r1};", 4, 4),
    ],
)
def test_counts_of_an_access(module, access, units, fewest):
    run(module, access, torch.zeros(256, dtype=torch.int32), shared=4096)
    [kernel] = module.kernels()
    counts = [row for row in kernel["code"] if row[5]]
    assert [row[3:7] for row in counts] == [(1, 32, units, fewest)]
    assert (kernel["launches"], kernel["blocks"], kernel["threads"]) == (1, 1, 32)
    module.reset_counts()
    assert module.kernels() == []


WALK = """
    mov.u32 %r7, 0;
    mov.u64 %rd5, %rd1;
    shl.b32 %r8, %r1, 2;
    cvt.u64.u32 %rd6, %r8;
    add.s64 %rd5, %rd5, %rd6;
    LOOP:
    {access}
    add.s64 %rd5, %rd5, 128;
    add.s32 %r7, %r7, 1;
    setp.lt.u32 %p2, %r7, 8;
    @%p2 bra LOOP;
"""


@pytest.mark.parametrize(
    "access, blocks, lines, expected",
    [
        ("ld.global.u32 %r9, [%rd5];", 1, 8, (1024, 0)),
        ("st.global.u32 [%rd5], %r1;", 1, 8, (0, 1024)),
        ("st.global.u32 [%rd5], %r1;", 1, 2, (0, 1024)),
        ("red.global.add.u32 [%rd5], %r1;", 1, 8, (1024, 1024)),
        ("ld.global.u32 %r9, [%rd5];", 3, 8, (1024, 0)),  # the first block's lines are there for the others
        ("ld.global.u32 %r9, [%rd5];", 3, 7, (3072, 0)),  # gone again before the next block comes by
        ("red.global.add.u32 [%rd5], %r1;", 3, 7, (3072, 3072)),
        ("setp.lt.u32 %p3, %r1, 8; @%p3 ld.global.u32 %r9, [%rd5];", 1, 8, (256, 0)),  # a sector of each line
    ],
)
def test_traffic_behind_a_cache(module, access, blocks, lines, expected):
    """Blocks of a warp that walk over 1024 bytes, one block at a time."""
    storage = torch.zeros(288, dtype=torch.int32)
    begin = -storage.data_ptr() % 128 // 4
    module.add_cache(lines * 128, 1)
    module.add_cache(1 << 20, 1)
    run(module, WALK.format(access=access), storage[begin : begin + 256], blocks=blocks)
    behind, behind_a_large_one = module.traffic()
    assert behind == expected
    assert behind_a_large_one == tuple(min(size, 1024) for size in expected)
    assert module.traffic() == []
