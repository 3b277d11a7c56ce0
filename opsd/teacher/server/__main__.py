"""`python -m opsd.teacher.server teacher.path=...`: a teacher that runs on other machines score with.

    OPSD_TEACHER_TOKEN=... python -m opsd.teacher.server host=0.0.0.0 port=8100 teacher.path=/models/teacher \
        teacher.tensor_parallel_size=8 teacher.dtype=bfloat16

Settings are those of config.py; the `teacher` section is a run's own. Ends with exit code 2 and one line where
a setting or the model cannot be used, and where the engine is lost.
"""

from opsd.teacher.server.program import launch

if __name__ == "__main__":
    launch()
