"""What shows a run while it is at work: the terminal, another terminal, a tracker."""
