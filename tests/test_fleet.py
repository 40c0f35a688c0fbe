"""Many nodes whose dashboard returns: no stampede, and none of them is forgotten."""

from __future__ import annotations

from fleet import simulate

import tinomail_agent as agent


def test_a_returning_dashboard_is_not_run_over() -> None:
    """As `make bench` with 1,000 nodes; with 200, chance has a larger part in the peak."""
    result = simulate(200)
    assert result.peak_per_s <= 2 * result.mean_per_s, result
    assert result.drained_after_s <= 900, result
    assert result.longest_silence_s <= 45, result
    assert result.requests >= 200 * 100
    assert result.lost == 0


def test_nodes_part_by_their_names() -> None:
    """To the second sample half to one and a half intervals pass, the same each time."""
    pauses = [agent.first_pause_s(f"mta-{i:02}", 20.0) for i in range(100)]
    assert pauses == [agent.first_pause_s(f"mta-{i:02}", 20.0) for i in range(100)]
    for start in (10, 15, 20, 25):
        assert 15 <= sum(start <= pause < start + 5 for pause in pauses) <= 35
