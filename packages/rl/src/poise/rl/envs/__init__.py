"""Environments: action spaces, exact states, resumable episodes, dm_control."""
