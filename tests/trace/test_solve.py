"""Connected components against a plain union-find, and pins that spread through ties."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attrim.core.channels import Reason
from attrim.trace.labels import Recorder
from attrim.trace.solve import components, solve


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def union_find(total: int, edges: list[tuple[int, int]]) -> list[int]:
    """The smallest node connected to each node, one edge at a time."""
    parent = list(range(total))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(node) for node in range(total)]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    total = draw(st.integers(1, 60))
    node = st.integers(0, total - 1)
    return total, draw(st.lists(st.tuples(node, node), max_size=80))


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_components_agree_with_union_find(graph: tuple[int, list[tuple[int, int]]]) -> None:
    total, edges = graph
    left, right = ints(*(a for a, _ in edges)), ints(*(b for _, b in edges))
    assert components(total, left, right).tolist() == union_find(total, edges)


def test_long_chains_in_either_direction_collapse_to_their_smallest_node() -> None:
    n = 5000
    forward = components(n, np.arange(n - 1), np.arange(1, n))
    backward = components(n, np.arange(n - 1, 0, -1), np.arange(n - 2, -1, -1))
    assert not forward.any()
    assert not backward.any()


def test_the_edge_arrays_are_not_changed() -> None:
    left, right = ints(3, 1, 2), ints(2, 0, 1)
    components(4, left, right)
    assert (left.tolist(), right.tolist()) == ([3, 1, 2], [2, 0, 1])


def test_a_pin_reaches_every_label_that_is_tied_to_it_and_no_other() -> None:
    book = Recorder()
    book.tie(ints(1, 2, 3), ints(4, 5, 6), Reason("meet"))
    book.tie(ints(5), ints(8), Reason("meet"))
    book.pin(ints(8), Reason("first"))
    book.pin(ints(2), Reason("second"))
    solution = solve(book, 10, [(ints(9), Reason("an output"))])
    assert solution.units.tolist() == [0, 1, 0, 3, 1, 0, 3, 7, 0, 0]
    assert solution.roots.tolist() == [0, 1, 2, 3, 1, 2, 3, 7, 2, 9]
    assert solution.reasons == {2: Reason("first"), 9: Reason("an output")}


def test_a_tie_to_the_immortal_label_pins_with_the_reason_of_the_tie() -> None:
    book = Recorder()
    book.tie(ints(1, 0, 3), ints(4, 5, 0), Reason("padded"))
    solution = solve(book, 6)
    assert solution.units.tolist() == [0, 1, 2, 0, 1, 0]
    assert solution.reasons == {5: Reason("padded"), 3: Reason("padded")}


def test_nothing_tied_leaves_every_label_its_own_unit() -> None:
    assert solve(Recorder(), 4).units.tolist() == [0, 1, 2, 3]
