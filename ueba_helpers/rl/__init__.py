"""Policies and their training: rollouts, advantages, PPO and GRPO, monitors, recipes."""
