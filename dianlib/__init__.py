"""Reference models and checks for the course.

Imports are explicit, one module an idea: ``from dianlib.metrics import confusion_matrix``.
"""
