"""What a role waited is what a step took without what its engines say they were at work."""

from opsd.monitor.idle import IdleTimer


def test_each_step_counts_what_was_heard_in_it():
    now = [100.0]
    idle = IdleTimer(clock=lambda: now[0])
    now[0] = 110.0
    first = idle.take({"rollout": [4.0, 8.0], "teacher": [1.0]}, learner_s=2.5)
    assert first == {"idle_s/learner": 7.5, "idle_s/rollout": 4.0, "idle_s/teacher": 9.0}
    now[0] = 114.0
    second = idle.take({"rollout": [6.0, 8.0], "teacher": [9.0]}, learner_s=0.0)
    assert second == {"idle_s/learner": 4.0, "idle_s/rollout": 3.0, "idle_s/teacher": 0.0}  # 8 s of it were heard late
