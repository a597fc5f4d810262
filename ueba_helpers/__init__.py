"""Reinforcement learning of small language models for insider-threat analysis: PPO against GRPO.

Four floors, each importing only those before it: `data`, `task`, `rl`, `study`.
"""

__version__ = "0.1.0"
