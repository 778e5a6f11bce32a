"""What a draft learns from its target: prompts, the target's own responses, students, objectives."""
