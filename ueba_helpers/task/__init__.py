"""The question put to the model: prompts, verdicts, rewards, and the classical baselines."""
