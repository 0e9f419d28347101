"""``python -m benchmarks scale``: the price of a step, by hand."""

from collections import Counter

import pytest

from benchmarks.fake_gpu import Collective, Trace
from benchmarks.fake_step import Measured
from benchmarks.scale import Rates, price, seconds_of

RATES = Rates(tflops=100, node_gb_s=100, network_gb_s=10, node_latency_us=10, network_latency_us=20, overlap=0.5)


@pytest.mark.parametrize(
    ("collective", "seconds"),
    [
        (Collective("allreduce", 10**9, 10**9, 8), 2 * 7 / 8 / 100 + 10e-6),
        (Collective("allgather", 10**8, 8 * 10**8, 8), 0.8 * 7 / 8 / 100 + 10e-6),
        (Collective("allreduce", 10**9, 10**9, 32), 2 * 31 / 32 / 10 + 3 * 20e-6),  # two doublings of one node
    ],
)
def test_the_time_of_a_collective(collective, seconds):
    assert seconds_of(collective, RATES) == pytest.approx(seconds)


def test_the_time_of_a_step():
    """1 TFLOP takes 10 ms, 1,000 launches 5 ms; half of the reduction of gradients hides behind the backward pass."""
    collectives = [Collective("allreduce", 4 * 10**8, 4 * 10**8, 8, gradients=True), Collective("allreduce", 0, 0, 2)]
    trace = Trace(Counter(mm=1000), collectives=collectives, flops=10**12)
    priced = price(Measured(trace, Trace(), ranks=8, rows=32), RATES)
    assert priced["gradients_ms"] == 7.01 and priced["other_collectives_ms"] == 0.01
    assert priced["step_ms"] == pytest.approx(10 + 7.01 / 2 + 0.01, abs=0.01)
    slow_host = Rates(**vars(RATES) | {"launch_us": 20.0})
    assert price(Measured(trace, Trace(), ranks=8, rows=32), slow_host)["step_ms"] == pytest.approx(23.515, abs=0.01)
