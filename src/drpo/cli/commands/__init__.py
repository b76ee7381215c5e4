"""What each command accepts, and its first checks; torch-free. The work is in `drpo.cli.NAME`, loaded last, by name."""
