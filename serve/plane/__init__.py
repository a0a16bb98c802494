"""Between front and workers: one session for each pair of them, its frames, and the two ends."""
