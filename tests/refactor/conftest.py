"""Scripts that run whole trainings: none of them is collected as a module with doctests."""

collect_ignore = ["old.py", "new.py", "driver.py"]
