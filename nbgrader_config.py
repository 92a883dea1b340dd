"""Settings for nbgrader: where things lie, and what keeps its plain commands out of known traps."""

import os
import sys
import warnings
from pathlib import Path

c = get_config()  # noqa: F821 (nbgrader provides it when it reads this file)

# ----- where things lie ----------------------------------------------------------------------------------

c.CourseDirectory.course_id = "dian"
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "exercises"

# Every file beside a notebook in solutions/ is released to students, and every file beside a submission
# comes back with the feedback; what programs leave behind is not meant to travel.
c.CourseDirectory.ignore = [".DS_Store", ".ipynb_checkpoints", "*.pyc", "__pycache__", "feedback"]

# ----- the release ---------------------------------------------------------------------------------------

# A stub fails loudly: a task left out can never look like a task solved.
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
c.ClearSolutions.text_stub = "Write your answer here."

# ----- grading -------------------------------------------------------------------------------------------

# Students' code runs in a sandbox, the judge stays outside, and unfinished work is taken up again: these
# lines plug dianlib.grading into nbgrader's own commands. See the chapter "Grading a class".
c.Autograde.exporter_class = "dianlib.grading.plugin.SafeExporter"
c.Autograde.sanitize_preprocessors = []  # the exporter hands on the release, with answers in it
c.Autograde.autograde_preprocessors = [
    "dianlib.grading.plugin.Judge",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
]
c.Autograde.post_convert_hook = "dianlib.grading.plugin.after"
c.ExportApp.plugin_class = "dianlib.grading.export.GradedOnly"

# Limits for a submission, in seconds and megabytes. One cell may train a small network.
c.Judge.cell_seconds = 30
c.Judge.submission_seconds = 300
c.Judge.memory_mb = 2048

# `nbgrader validate` and `nbgrader generate_assignment` run the instructor's own notebooks, unguarded.
c.Execute.timeout = 120
# A kernel that has nothing to save need not be asked to leave: this saves a second for each submission.
c.Execute.shutdown_kernel = "immediate"
# What students' code does is no part of the instructor's own IPython history.
c.Execute.extra_arguments = ["--HistoryManager.hist_file=:memory:", "--IPKernelApp.log_level=ERROR"]

# nbgrader starts `alembic`, and the kernel, by name. Called by its full path from outside the environment
# it would not find them, and leave half a gradebook.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

# A test cell that writes anything to stderr gets no points, and a warning of a library goes to stderr.
os.environ["PYTHONWARNINGS"] = "ignore"

# SQLAlchemy 2 says this many times for each new submission; it has no consequence.
warnings.filterwarnings("ignore", message="Object of type .* not in session")
