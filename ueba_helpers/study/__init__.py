"""The experiment: profiles, run folders, evaluation, figures, the notebook pipeline."""
