"""All passes together: random graphs, and blocks of known networks."""

import pytest
from compiler.build import assert_same
from compiler.random_graphs import graphs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groupconv.compiler.graph import Graph
from groupconv.compiler.passes import PASSES, optimize

slow_strategy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=100, deadline=None, suppress_health_check=slow_strategy)
@given(graphs())
def test_random_graphs_compute_the_same(graph: Graph) -> None:
    found = optimize(graph)
    assert_same(graph, found)
    assert optimize(found) is found


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=slow_strategy)
@given(graphs())
def test_many_random_graphs_compute_the_same(graph: Graph) -> None:
    assert_same(graph, optimize(graph))


@settings(max_examples=60, deadline=None, suppress_health_check=slow_strategy)
@given(graphs(), st.sampled_from(PASSES))
def test_each_pass_alone_computes_the_same(graph: Graph, change: object) -> None:
    assert_same(graph, change(graph))
