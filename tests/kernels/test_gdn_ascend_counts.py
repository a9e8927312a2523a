"""What ascend_hivm.py counts, on a kernel small enough to count by hand."""

# The lines of a compiler are as long as they are.
# ruff: noqa: E501

from __future__ import annotations

import ascend_hivm
import pytest

GM = "#hivm.address_space<gm>"
UB = "#hivm.address_space<ub>"
ROWS = f"memref<?x8xf16, strided<[8, 1], offset: ?>, {GM}>"
ANY = f"memref<?x?xf16, strided<[?, ?], offset: ?>, {GM}>"
LOCAL = f"memref<?x?xf16, strided<[?, ?], offset: ?>, {UB}>"
PLAIN = f"memref<?xf16, {GM}>"
INTS = f"memref<?xi32, {GM}>"
ONE = f"memref<1xi32, strided<[1], offset: ?>, {GM}>"
HIDDEN = (
    "%arg0: i64 {hacc.arg_type = #hacc.arg_type<ffts_base_address>}, "
    f"%arg1: memref<?xi8, {GM}> {{hacc.arg_type = #hacc.arg_type<sync_block_lock>}}, "
    f"%arg2: memref<?xi8, {GM}> {{hacc.arg_type = #hacc.arg_type<workspace>}}"
)
OWN = f"%arg3: {PLAIN}, %arg4: {INTS}, %arg5: i32"
GRID = "%arg6: i32, %arg7: i32, %arg8: i32"


def function(core: str, body: str) -> str:
    about = f"hacc.entry, hivm.func_core_type = #hivm.func_core_type<{core}>"
    head = f"  func.func @kernel({HIDDEN}, {OWN}, {GRID}) attributes {{{about}}} {{"
    return f"{head}{body}\n    return\n  }}"


# From the block's number on every n-th item: its length is read, so many rows of 8 are, and if they
# are four or more the vector core hands four to the workspace, once for both of its halves.
VECTOR = f"""
    %c0 = arith.constant 0 : index
    %c4 = arith.constant 4 : index
    %c1_i64 = arith.constant 1 : i64
    %c-1_i32 = arith.constant -1 : i32
    %c64_i64 = arith.constant 64 : i64
    %9 = hivm.hir.pointer_cast(%c64_i64) : memref<4x8xf16, {UB}>
    %10 = hivm.hir.get_block_idx -> i64
    %11 = arith.trunci %10 : i64 to i32
    %12 = hivm.hir.get_sub_block_idx -> i64
    %13 = arith.cmpi eq, %12, %c1_i64 : i64
    %20:2 = scf.for %arg9 = %11 to %arg5 step %arg6 iter_args(%arg10 = %c0, %arg11 = %9) -> (index, memref<4x8xf16, {UB}>)  : i32 {{
      %21 = arith.index_cast %arg9 : i32 to index
      %cast = memref.reinterpret_cast %arg4 to offset: [%21], sizes: [1], strides: [1] : {INTS} to {ONE}
      %22 = memref.load %cast[%c0] {{hint = 0 : i32}} : {ONE}
      %23 = arith.subi %22, %c-1_i32 : i32
      %24 = arith.index_cast %23 : i32 to index
      %25 = affine.apply #map()[%24]
      %26 = affine.min #map1()[%25, %c4]
      %cast_0 = memref.reinterpret_cast %arg3 to offset: [%21], sizes: [4, 8], strides: [8, 1] : {PLAIN} to memref<4x8xf16, strided<[8, 1], offset: ?>, {GM}>
      %subview = memref.subview %cast_0[0, 0] [%26, 8] [1, 1] : memref<4x8xf16, strided<[8, 1], offset: ?>, {GM}> to {ROWS}
      %cast_1 = memref.cast %subview : {ROWS} to {ANY}
      %cast_2 = memref.cast %9 : memref<4x8xf16, {UB}> to {LOCAL}
      func.call @load_gm_to_ubuf_2d_half(%cast_1, %cast_2, %arg5) : ({ANY}, {LOCAL}, i32) -> ()
      func.call @vexp_2d_half(%cast_2, %cast_2) : ({LOCAL}, {LOCAL}) -> ()
      %27 = arith.cmpi sge, %26, %c4 : index
      %28 = scf.if %27 -> (index) {{
        %view = memref.view %arg2[%c0][] : memref<?xi8, {GM}> to memref<4x8xf16, {GM}>
        scf.if %13 {{
          func.call @store_ubuf_to_gm_2d_half(%cast_2, %view, %arg5) : ({LOCAL}, memref<4x8xf16, {GM}>, i32) -> ()
        }} {{limit_sub_block_id0}}
        scf.yield %c4 : index
      }} else {{
        scf.yield %arg10 : index
      }}
      hivm.hir.sync_block_wait[<VECTOR>, <PIPE_FIX>, <PIPE_S>] flag = 1
      scf.yield %28, %arg11 : index, memref<4x8xf16, {UB}>
    }}"""
CUBE = f"""
    %c8 = arith.constant 8 : index
    %true = arith.constant true
    %c0_i64 = arith.constant 0 : i64
    %c1 = arith.constant 1 : index
    %9 = hivm.hir.pointer_cast(%c0_i64) : memref<1x1x16x16xf16, #hivm.address_space<cbuf>>
    %view = memref.view %arg2[%c1][%c8] : memref<?xi8, {GM}> to memref<?x8xf16, {GM}>
    %collapse = memref.collapse_shape %view [[0, 1]] : memref<?x8xf16, {GM}> into memref<?xf16, {GM}>
    func.call @nd2nz_half(%collapse, %9) : (memref<?xf16, {GM}>, memref<1x1x16x16xf16, #hivm.address_space<cbuf>>) -> ()
    func.call @mma_tile_half_to_float(%9, %9, %true, %c8, %c8, %c8, %9) : (memref<1x1x16x16xf16, #hivm.address_space<cbuf>>, memref<1x1x16x16xf16, #hivm.address_space<cbuf>>, i1, index, index, index, memref<1x1x16x16xf16, #hivm.address_space<cbuf>>) -> ()"""
MAPS = """#map = affine_map<()[s0] -> ((s0 + 3) floordiv 2)>
#map1 = affine_map<()[s0, s1] -> (s0, s1)>
module {
"""
TEXT = MAPS + function("AIC", CUBE) + "\n" + function("AIV", VECTOR) + "\n}"


def count(grid: int, lengths: list[int]) -> ascend_hivm.Counts:
    arguments = [(0, 0, (), None), (1, 0, (), lengths), len(lengths)]
    return ascend_hivm.count(TEXT, arguments, (grid, 1, 1))


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_a_kernel_counted_by_hand(grid):
    lengths = [0, 1, 2, 3, 9]
    rows = [min((length + 1 + 3) // 2, 4) for length in lengths]
    assert rows == [2, 2, 3, 3, 4]
    found = count(grid, lengths)
    # Both vector cores read; one of them hands on.
    assert found.read == {1: 2 * 4 * 5, 0: 2 * 16 * sum(rows), "workspace": grid * 8 * 8 * 2}
    assert found.written == {"workspace": 4 * 8 * 2}
    assert found.moved(workspace=True) == (grid * 128, 64)
    assert found.moved(workspace=False) == (40 + 32 * sum(rows), 0)
    assert found.products == grid * 2 * 8 * 8 * 8
    assert found.elements == 2 * 5 * 32
    assert found.waits == 2 * 5


def test_planned_memory_is_the_end_of_the_last_allocation():
    assert ascend_hivm.planned(TEXT) == 64 + 4 * 8 * 2
    assert ascend_hivm.planned(TEXT, "cbuf") == 16 * 16 * 2
    assert ascend_hivm.planned(TEXT, "cc") == 0


def test_what_it_does_not_know_is_refused():
    with pytest.raises(NotImplementedError, match=r"scf\.while"):
        ascend_hivm.functions(TEXT.replace("%10 = hivm.hir.get_block_idx -> i64", "scf.while"))
