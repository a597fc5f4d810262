"""From CERT r4.2 files to labelled account-day windows: files, simulator, windows, splits."""
