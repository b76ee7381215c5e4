"""The colours of every figure: apart for colour-blind eyes, and plain to see on white and on a dark page."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#C26A9B", "#A87400", "#2F94D0", "#77818C")
"""After Okabe and Ito's palette; the pale ones are darker, and grey is in the place of black."""
