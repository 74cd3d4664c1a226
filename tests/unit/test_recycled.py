"""Memory of chunks: never two owners at once, used again, grown when a larger chunk comes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.model.recycled import RecycledMemory


def test_what_was_given_back_is_used_again() -> None:
    memory = RecycledMemory(8, 3, pinned=False)
    first = memory.take(10)
    first.emb_BV.fill_(7)
    memory.give_back(first)
    again = memory.take(10)
    assert again.emb_BV.data_ptr() == first.emb_BV.data_ptr()
    assert memory.take(10).emb_BV.data_ptr() != first.emb_BV.data_ptr()


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=30))
def test_no_two_chunks_share_memory_and_each_has_its_shape(steps: list[tuple[int, bool]]) -> None:
    memory, out = RecycledMemory(4, 2, pinned=False), []
    for number, (rows, gives_back) in enumerate(steps):
        taken = memory.take(rows)
        assert (taken.emb_BV.shape, taken.coord_BR.shape, taken.residual_B.shape) == ((rows, 4), (rows, 2), (rows,))
        taken.emb_BV.fill_(number)
        taken.coord_BR.fill_(number)
        taken.residual_B.fill_(number)
        out.append((number, taken))
        if gives_back:
            memory.give_back(out.pop(0)[1])
        for owner, chunk in out:
            assert all((values == owner).all() for values in (chunk.emb_BV, chunk.coord_BR, chunk.residual_B))
