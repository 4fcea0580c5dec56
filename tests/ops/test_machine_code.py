from __future__ import annotations

import pytest

from benchmarks import machine_code

# As `cuobjdump -sass` prints it: encodings and blank lines between the instructions.
LISTING = """
\tcode for sm_90a
\t\tFunction : example
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000e300000000800 */
        /*0010*/                   CCTL.E.PF2 [R2] ;                            /* 0x00000a00ff017b82 */
        /*0020*/                   ACQBULK ;                                    /* 0x00000a00ff017b82 */
        /*0030*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R2.64] ;    /* 0x00000a00ff017b82 */
        /*0040*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;              /* 0x00000a00ff017b82 */
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64] ;
        /*0060*/              @!P1 BRA 0x100 ;                                  /* 0x00000a00ff017b82 */
        /*0070*/              @P0  LDG.E.64 R6, desc[UR4][R2.64] ;              /* 0x00000a00ff017b82 */
        /*0080*/               @P2 BRA 0x50 ;                                   /* 0x00000a00ff017b82 */
        /*0090*/                   LDG.E R8, desc[UR4][R2.64] ;                 /* 0x00000a00ff017b82 */
        /*00a0*/               @P3 BRA 0x40 ;                                   /* 0x00000a00ff017b82 */
        /*00b0*/                   PREEXIT ;                                    /* 0x00000a00ff017b82 */
        /*00c0*/                   STG.E.128 desc[UR4][R2.64], R4 ;             /* 0x00000a00ff017b82 */
        /*00d0*/                   EXIT ;                                       /* 0x00000a00ff017b82 */
        /*00e0*/                   LDG.E.U16 R3, desc[UR4][R2.64] ;             /* 0x00000a00ff017b82 */
        /*00f0*/                   BRA 0xb0 ;                                   /* 0x00000a00ff017b82 */
        /*0100*/                   LDG.E R3, desc[UR4][R2.64] ;                 /* 0x00000a00ff017b82 */
        /*0110*/                   BRA 0x70 ;                                   /* 0x00000a00ff017b82 */
        /*0120*/                   BRA 0x120 ;                                  /* 0x00000a00ff017b82 */
"""


def test_widths_of_loads_inside_and_outside_of_loops():
    found = machine_code.read(LISTING)
    assert found.loads == {1: 1, 2: 2, 4: 2, 8: 1, 16: 1}
    # 0x50 to 0x80 and the rare path at 0x100, which jumps back into it; 0xe0 jumps back too, but out of no loop.
    assert found.loop_loads == {4: 1, 8: 1, 16: 1}
    assert found.outer_loads == {1: 1, 4: 1}


def test_what_comes_before_the_wait():
    found = machine_code.read(LISTING)
    assert (found.waits, found.triggers, found.early, found.prefetches) == (1, 1, 0, 1)
    late = LISTING.replace("ACQBULK", "NOP").replace("LDG.E R8, desc[UR4][R2.64]", "ACQBULK")
    # The three ahead of it, the conditional one, and the rare path's.
    assert machine_code.read(late).early == 5
    assert machine_code.read(LISTING.replace("ACQBULK", "NOP")).early == 0


@pytest.mark.parametrize(
    "registers, warps, shared, expected",
    [(32, 4, 0, 16), (72, 4, 4096, 7), (96, 4, 4096, 5), (160, 8, 0, 1), (36, 4, 98304, 2), (255, 4, 0, 2)],
)
def test_programs_resident_on_a_multiprocessor(registers, warps, shared, expected):
    pytest.importorskip("triton")
    from benchmarks.compile_offline import resident

    assert resident(90, registers, warps, shared) == expected
