"""Optimal Brain Surgeon criteria: CAP/oViT, WoodFisher, OBC, FastCAP and structured OBS."""
