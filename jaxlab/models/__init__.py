"""Networks on images, volumes, points and signals: one file per system."""
