"""Cycles read from what the TPU compiler writes."""

from __future__ import annotations

from jaxlm.bench.cycles import of_program, scheduled

PROGRAM = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8] fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(7)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%x), condition=%condition, body=%body
  ROOT %b = f32[8] fusion(%w), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"11"}
}
"""


def bundles(*lengths: int) -> str:
    """A schedule of branches of these lengths behind 16 bundles, and 4 behind the last."""
    lines, at = ["= control target key start", "PF: predicated region fallthrough", "     0   :  { %s = x }"], 16
    for length in lengths:
        lines.append(f"0x{at:x} PF: > {{ %v = vadd }}")
        at += length
    return "\n".join([*lines, f"0x{at:x} PF: > {{ %s }}", f"0x{at + 4:x}   :  {{ %t = vst 0x10 PF }}"])


def test_what_a_loop_runs_counts_as_often():
    assert of_program(PROGRAM) == 7 * 100 + 11
    assert of_program(PROGRAM.replace('"11"', f'"{2**63 - 1}"')) is None


def test_a_step_of_a_kernel_is_as_long_as_its_schedule(tmp_path):
    assert scheduled(tmp_path, "forward", ragged=False) is None
    (tmp_path / "1-forward.1-72-final_bundles.txt").write_text(bundles(5, 900))
    (tmp_path / "2-forward.1-71-schedule-analysis_final_bundles.txt").write_text("total scheduled bundles: 1")
    whole = 16 + 5 + 900 + 4 + 1
    assert scheduled(tmp_path, "forward", ragged=False) == whole
    (tmp_path / "3-forward.1-72-final_bundles.txt").write_text(bundles(5, 900, 800))  # the one that was compiled last
    assert scheduled(tmp_path, "forward", ragged=True) == whole
