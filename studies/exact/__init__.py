"""Problems that are computed exactly, and the papers' claims compared with the results."""
