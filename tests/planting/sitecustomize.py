"""Plants the bug that $DRPO_PLANTED names, in any Python process that has this folder on its PYTHONPATH."""

import os

if "DRPO_PLANTED" in os.environ:
    from planted import plant_when_imported

    plant_when_imported(os.environ["DRPO_PLANTED"])
