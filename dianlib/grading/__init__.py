"""Grade a class: student code runs in a sandbox, the judge stays outside, nbgrader keeps the grades."""
