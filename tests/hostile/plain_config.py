"""The course's settings for nbgrader without its own grader: nbgrader runs and judges in one kernel."""

from pathlib import Path

c = get_config()  # noqa: F821 (nbgrader provides it when it reads this file)

c.CourseDirectory.course_id = "dian"
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "exercises"
c.CourseDirectory.ignore = [".DS_Store", ".ipynb_checkpoints", "*.pyc", "__pycache__", "feedback"]
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
c.ClearSolutions.text_stub = "Write your answer here."
c.Execute.timeout = 10
c.Execute.shutdown_kernel = "immediate"
c.Execute.extra_arguments = ["--HistoryManager.hist_file=:memory:", "--IPKernelApp.log_level=ERROR"]
