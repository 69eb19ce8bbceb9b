"""Loops in listings as nvcc writes them, cut short."""

from __future__ import annotations

import loops


def listing(*lines: str) -> list[loops.Instruction]:
    """Instructions at 0x00, 0x10, ..."""
    parsed = [loops.parse_instruction(f"        /*{16 * k:04x}*/  {line} ;") for k, line in enumerate(lines)]
    assert None not in parsed
    return parsed


def addresses(*lines: str) -> list[int]:
    return [instruction.address // 16 for instruction in loops.in_loops(listing(*lines))]


def test_an_instruction():
    line = "        /*01f0*/              @!P1 LDG.E.64 R2, desc[UR6][R2.64+0x10] ;   /* 0x0000000402007981 */"
    assert loops.parse_instruction(line) == (0x1F0, "!P1", "LDG.E.64", "R2, desc[UR6][R2.64+0x10]")
    assert loops.parse_instruction("                          /* 0x000ea2000c1e9d00 */") is None
    assert loops.parse_instruction("\t\tFunction : _Z1fv") is None


def test_jumps_back_make_loops_and_jumps_forward_none():
    assert addresses("MOV R1, R2", "LDG.E R0, [R2.64]", "@P0 BRA 0x10", "EXIT") == [1, 2]
    assert addresses("@P0 BRA 0x20", "LDG.E R0, [R2.64]", "EXIT") == []


def test_code_that_was_moved_behind_the_end_is_in_no_loop():
    """It jumps back to where it was taken from, over instructions that run once."""
    assert (
        addresses("@P0 BRA 0x40", "LDG.E R0, [R2.64]", "STG.E [R2.64], R0", "EXIT", "FADD R0, R0, R1", "BRA 0x20") == []
    )


def test_threads_that_meet():
    """BSYNC goes on where the last BSSY of its register said, here behind a part of a loop that is left early."""
    code = (
        "BSSY B0, 0x60",
        "LDG.E R0, [R2.64]",
        "@P0 BRA 0x50",
        "BRA 0x10",
        "EXIT",
        "BSYNC B0",
        "STG.E [R2.64], R0",
        "EXIT",
    )
    assert addresses(*code) == [1, 2, 3]


def test_what_a_loop_calls_is_in_it():
    code = (
        "CALL.REL.NOINC 0x50",
        "MOV R1, R2",
        "CALL.REL.NOINC 0x40",
        "@P0 BRA 0x10",
        "RET.REL.NODEC R4 0x0",
        "RET.REL.NODEC R4 0x0",
    )
    assert addresses(*code, "EXIT") == [1, 2, 3, 4]


def test_a_call_from_which_the_kernel_ends_is_a_jump():
    code = ("LDG.E R0, [R2.64]", "@P1 CALL.REL.NOINC 0x30", "BRA 0x00", "STG.E [R2.64], R0", "EXIT")
    assert addresses(*code) == [0, 1, 2]


def test_tables_of_jumps_lead_on():
    code = ("LDG.E R0, [R2.64]", "BRX R4 -0x20", "FADD R0, R0, R1", "BRA 0x00", "STG.E [R2.64], R0", "EXIT")
    assert addresses(*code) == [0, 1, 2, 3]
