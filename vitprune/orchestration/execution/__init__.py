"""Run DVC stages: processes, locks, worktrees and the DVC cache."""
