"""Training: the one loop, and what a recipe, a teacher, several processes and a break-off make of it."""
