"""What people look at: the terminal while a run goes, and figures afterwards."""
